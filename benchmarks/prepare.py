"""Memory of a Llama before and after prepare(), by producer; needs torchao and NVIDIA ModelOpt.

python benchmarks/prepare.py
"""

import copy
import gc
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from marlin_w4a16 import prepare, restore
from marlin_w4a16.passes.graph.torch_private import inner_tensors

warnings.filterwarnings("ignore")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def llama() -> LlamaForCausalLM:
    """Layers as those of Llama 3 8B, fewer of them; tiny on a CPU."""
    hidden, inner, layers = (4096, 14336, 8) if DEVICE == "cuda" else (256, 512, 2)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=2,
    )
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def is_layer_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def by_torchao(model: nn.Module) -> nn.Module:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    quantize_(model, NVFP4WeightOnlyConfig(), filter_fn=is_layer_linear)
    return model


def by_modelopt(name: str, compress: bool):
    def quantize(model: nn.Module) -> nn.Module:
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(getattr(mtq, name))
        config["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
        mtq.quantize(model, config)
        if compress:
            mtq.compress(model)
        return model

    return quantize


CASES = {
    "torchao NVFP4": by_torchao,
    "ModelOpt NVFP4, compressed": by_modelopt("NVFP4_DEFAULT_CFG", True),
    "ModelOpt MXFP4, compressed": by_modelopt("MXFP4_DEFAULT_CFG", True),
    "ModelOpt NVFP4, fake-quantised, recover=True": by_modelopt("NVFP4_DEFAULT_CFG", False),
}


def held(model: nn.Module | None) -> float:
    """MiB: of the device where it is a GPU, else of the model's tensors."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / 2**20
    if model is None:
        return 0.0
    parts = [part for t in model.state_dict(keep_vars=True).values() for part in inner_tensors(t)]
    return sum({t.data_ptr(): t.nbytes for t in parts}.values()) / 2**20


@torch.no_grad()
def main() -> None:
    table = Table(title=f"prepare() on {DEVICE}, torch {torch.__version__}: MiB held")
    for column in ("model", "bf16", "before", "after", "peak above", "restored", "seconds", "linears", "error"):
        table.add_column(column)
    tokens = torch.arange(64, device=DEVICE).view(2, 32)
    refused = {}
    for name, quantize in CASES.items():
        torch.manual_seed(0)
        start = held(None)  # frames that ModelOpt keeps may hold the model before
        model = llama()
        dense = held(model) - start
        model = quantize(model)
        try:
            expected = model(tokens, use_cache=False).logits.float()
        except Exception as error:  # fake quantisers run on a GPU only
            expected = None
            print(f"{name}: does not run here: {type(error).__name__}: {error}")
        before = held(model) - start
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        swaps = prepare(model, recover="recover" in name)
        after, seconds = held(model) - start, time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() / 2**20 - start - before if DEVICE == "cuda" else 0.0
        error = "-"
        if expected is not None:
            found = model(tokens, use_cache=False).logits.float()
            error = f"{((found - expected).norm() / expected.norm()).item():.1e}"
        restored = f"{held(restore(model) and model) - start:.0f}"
        if expected is not None:
            same = torch.equal(model(tokens, use_cache=False).logits.float(), expected)
            restored += ", same bits" if same else ", OTHER OUTPUT"
        numbers = (f"{dense:.0f}", f"{before:.0f}", f"{after:.0f}", f"{peak:.0f}", restored, f"{seconds:.2f}")
        table.add_row(name, *numbers, f"{len(swaps.done)} of {len(swaps.rows)}", error)
        refused |= {f"{name}: {row.refusal}": row.path for row in swaps.refused}
        del model
    Console(width=160).print(table)
    for reason, path in refused.items():
        print(f"left, such as {path}: {reason}")


if __name__ == "__main__":
    main()
