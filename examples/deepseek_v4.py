"""DeepSeek-V4 as it is published, experts in MXFP4 and the rest in FP8: loaded, generating eagerly, then compiled.

    python examples/deepseek_v4.py PATH    # a folder or a name on the hub, such as deepseek-ai/DeepSeek-V4-Flash
    python examples/deepseek_v4.py         # a tiny random one in the same layout, on a CPU too

Its cache cannot be static in transformers, so generate() does not compile decode: blocks that hold no cache, such as
the mixtures, are compiled each by itself, for prefill too.
"""

import torch
from generating import DEVICE, DTYPE, arguments, checkpoint, compare, generate, prompt
from tiny_checkpoints import deepseek_v4
from transformers import AutoModelForCausalLM

import marlin_w4a16.hf  # before from_pretrained
from marlin_w4a16.hf import compile_blocks


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__)
    with checkpoint(args.path, deepseek_v4) as path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map=DEVICE)
    print(marlin_w4a16.hf.report(model))
    tokens = prompt(args.path, args.prompt, model)
    eager = generate("eager", model, tokens, args.new_tokens)

    compile_blocks(model)
    compiled = generate("blocks compiled", model, tokens, args.new_tokens, runs=2)
    compare(eager, compiled, args.path, model)


if __name__ == "__main__":
    main()
