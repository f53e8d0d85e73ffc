"""Nemotron-H as NVIDIA publishes it, experts in NVFP4 and Mamba in FP8: loaded, generating eagerly, then compiled.

python examples/nemotron_h.py PATH    # a folder or a name on the hub: nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4
python examples/nemotron_h.py         # a tiny random one in the same layout, on a CPU too
"""

from generating import DEVICE, DTYPE, arguments, checkpoint, eager_then_compiled
from tiny_checkpoints import nemotron_h
from transformers import AutoModelForCausalLM

import marlin_w4a16.hf  # before from_pretrained


def main() -> None:
    args = arguments(__doc__)
    with checkpoint(args.path, nemotron_h) as path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map=DEVICE)
    print(marlin_w4a16.hf.report(model))
    eager_then_compiled(model, args)


if __name__ == "__main__":
    main()
