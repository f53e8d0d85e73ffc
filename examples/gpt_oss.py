"""gpt-oss as it is published, in MXFP4: loaded four bits wide, generating eagerly, then with decode compiled.

python examples/gpt_oss.py PATH    # a folder or a name on the hub, such as openai/gpt-oss-20b
python examples/gpt_oss.py         # a tiny random one in the same layout, on a CPU too
"""

from generating import DEVICE, DTYPE, arguments, checkpoint, eager_then_compiled
from tiny_checkpoints import gpt_oss
from transformers import AutoModelForCausalLM

import marlin_w4a16.hf  # before from_pretrained


def main() -> None:
    args = arguments(__doc__)
    with checkpoint(args.path, gpt_oss) as path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map=DEVICE)
    print(marlin_w4a16.hf.report(model))
    eager_then_compiled(model, args)


if __name__ == "__main__":
    main()
