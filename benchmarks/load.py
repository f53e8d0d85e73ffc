"""A Llama checkpoint of 8B shape with random FP4 weights: memory and time of loading it, against the bound.

python benchmarks/load.py --folder /tmp/llama --format nvfp4     # writes it, loads it, prints a table
python -m marlin_w4a16 bench /tmp/llama                          # then: prefill and decode against bf16
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import marlin_w4a16.hf
from marlin_w4a16.checkpoints import files
from marlin_w4a16.tensors import held_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# quantization_config as ModelOpt (NVFP4) and compressed-tensors (MXFP4) write it
FORMATS = {
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16, "ignore": ["lm_head"]},
    "mxfp4": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "mxfp4-pack-quantized",
                "weights": {
                    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
                    "scale_dtype": "torch.uint8",
                },
            }
        },
    },
}  # fmt: skip


def config(layers: int) -> LlamaConfig:
    """Llama 3 8B; tiny on a CPU."""
    hidden, inner, vocab = (4096, 14336, 128256) if DEVICE == "cuda" else (256, 512, 1024)
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        max_position_embeddings=8192,
        dtype=torch.bfloat16,
    )


def quantised(name: str, n: int, k: int, form: str) -> dict[str, Tensor]:
    """Random codes and scales of one linear; their product has about the size of an initial weight."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    if form == "mxfp4":
        scales = torch.randint(118, 121, (n, k // 32), dtype=torch.uint8, device=DEVICE)
        return {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}
    scales = torch.randint(0x60, 0x70, (n, k // 16), dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)
    factor = torch.tensor(2.0**-13, device=DEVICE)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": factor}


def write(folder: Path, form: str, layers: int) -> None:
    """Writes the checkpoint, one shard a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(layers))
    shards: dict[str, dict[str, Tensor]] = {}
    for path, module in model.named_modules():
        shard = shards.setdefault(path.split(".")[2] if ".layers." in path else "rest", {})
        if isinstance(module, nn.Linear) and path != "lm_head":
            shard |= quantised(path, *module.weight.shape, form)
        elif hasattr(module, "weight"):
            value = torch.ones if module.weight.ndim == 1 else torch.randn
            shard[f"{path}.weight"] = value(module.weight.shape, device=DEVICE, dtype=torch.bfloat16)
            if module.weight.ndim > 1:
                shard[f"{path}.weight"] *= 0.02
    index = {}
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    values = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": FORMATS[form]}
    (folder / "config.json").write_text(json.dumps(values))


def load(folder: Path) -> dict[str, float]:
    """Loads it, and measures."""
    largest = max(entry.nbytes for entry in files.entries(files.files_of(folder)).values())
    cuda = DEVICE == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE)
    seconds = time.perf_counter() - start
    held = sum(tensor.nbytes for tensor in held_tensors(model))
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return {"held": held, "peak": peak, "bound": held + largest + (64 << 20), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/marlin_w4a16_llama"))
    parser.add_argument("--format", choices=FORMATS, default="nvfp4")
    parser.add_argument("--layers", type=int, default=32 if DEVICE == "cuda" else 2)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("marlin_w4a16").setLevel(logging.INFO)
    write(args.folder, args.format, args.layers)
    found = load(args.folder)
    print(marlin_w4a16.__version__, torch.__version__, DEVICE)
    table = Table("format", "held, MiB", "peak of loading, MiB", "bound, MiB", "seconds")
    mib = [f"{found[name] / 2**20:.0f}" for name in ("held", "peak", "bound")]
    table.add_row(args.format, *mib, f"{found['seconds']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
