"""Nemotron-H as NVIDIA publishes it, experts in NVFP4 and Mamba in FP8: loaded, generating eagerly, then compiled.

python examples/nemotron_h.py PATH    # a folder or a name on the hub: nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4
python examples/nemotron_h.py         # a tiny random one in the same layout, on a CPU too
"""

import torch
from generating import DEVICE, DTYPE, arguments, checkpoint, compare, generate, prompt
from tiny_checkpoints import nemotron_h
from transformers import AutoModelForCausalLM

import marlin_w4a16.hf  # before from_pretrained


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__)
    with checkpoint(args.path, nemotron_h) as path:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE, device_map=DEVICE)
    print(marlin_w4a16.hf.report(model))
    tokens = prompt(args.path, args.prompt, model)
    eager = generate("eager", model, tokens, args.new_tokens)

    # The plugin has set this backend for decode with a static cache; on CPUs transformers compiles only if told so.
    model.generation_config.compile_config._compile_all_devices = True
    compiled = generate("compiled", model, tokens, args.new_tokens, runs=2, cache_implementation="static")
    compare(eager, compiled, args.path, model)


if __name__ == "__main__":
    main()
