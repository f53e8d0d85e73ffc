"""What finding FP4 costs: a Llama of many layers, traced and rewritten, beside its compilation by Inductor in bfloat16.

python benchmarks/compile_cost.py [--layers 80] [--parts trace,inductor,memory]

Runs on the CPU. The memory part is of one weight on a GPU, where there is one: the peak of the pass above that of one
eager decode.
"""

import argparse
import functools
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from marlin_w4a16 import E2M1_VALUES, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.graph.torch_private import compile_graph
from marlin_w4a16.passes.judge import search as judging
from marlin_w4a16.passes.outcome import Replaced
from marlin_w4a16.passes.rewrite import rewrite

TABLE = torch.tensor(E2M1_VALUES)


class NVFP4Linear(nn.Module):
    """Codes, scales and a global scale, decoded by a table in forward."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        weight = quantize_nvfp4(dense.weight)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.view(torch.float8_e4m3fn))
        self.register_buffer("global_scale", weight.multiplier[0].clone())
        self.register_buffer("table", TABLE.to(weight.codes.device))

    def weight(self) -> Tensor:
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()
        scales = self.scales.float() * self.global_scale
        return (self.table[codes].unflatten(-1, (-1, 16)) * scales.unsqueeze(-1)).flatten(-2).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight())


class MXFP4Linear(NVFP4Linear):
    """Powers of two, shifted into place."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense)
        weight = quantize_mxfp4(dense.weight)
        self.codes, self.scales = weight.codes, weight.scales

    def weight(self) -> Tensor:
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()
        scales = torch.exp2(self.scales.float() - 127)
        return (self.table[codes].unflatten(-1, (-1, 32)) * scales.unsqueeze(-1)).flatten(-2).bfloat16()


def llama(layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def quantised(model: nn.Module, linear: type[nn.Module]) -> nn.Module:
    for parent in list(model.model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, linear(child))
    return model


def trace(model: nn.Module, then: Callable[..., None]) -> float:
    """Seconds of Dynamo alone; ``then`` gets the graph and its inputs."""
    torch._dynamo.reset()
    calls = []

    def backend(gm, inputs):
        calls.append((gm, inputs, time.perf_counter()))
        return lambda *args: (torch.zeros(1, 16, 1024, dtype=torch.bfloat16),)

    begin = time.perf_counter()
    torch.compile(model, backend=backend, fullgraph=True)(torch.zeros(1, 16, dtype=torch.long), use_cache=False)
    ((gm, inputs, end),) = calls
    then(gm, inputs)
    return end - begin


@torch.no_grad()
def costs(layers: int, with_inductor: bool) -> None:
    torch.manual_seed(0)
    searches = 0
    search = judging._Search.run

    def counted(self, value):
        nonlocal searches
        searches += 1
        return search(self, value)

    judging._Search.run = counted
    for linear in (NVFP4Linear, MXFP4Linear):
        took = {}

        def rewriting(gm, inputs, took=took):
            begin = time.perf_counter()
            rows = rewrite(gm, inputs).rows
            took["rewrite"] = time.perf_counter() - begin
            took["replaced"] = sum(isinstance(row.outcome, Replaced) for row in rows)
            took["rows"] = len(rows)

        searches = 0
        took["trace"] = trace(quantised(llama(layers), linear), rewriting)
        print(
            f"{linear.__name__}: Dynamo {took['trace']:.1f} s, rewritten in {took['rewrite']:.1f} s with packing, "
            f"{took['replaced']} of {took['rows']} replaced, {searches} searches",
            flush=True,
        )
    judging._Search.run = search
    if with_inductor:
        took = {}

        def compiling(gm, inputs):
            begin = time.perf_counter()
            compile_graph(gm, inputs, {"fx_graph_cache": False})(*inputs)
            took["inductor"] = time.perf_counter() - begin

        seconds = trace(llama(layers), compiling)
        print(f"bfloat16: Dynamo {seconds:.1f} s, Inductor {took['inductor']:.1f} s")


@torch.no_grad()
def memory() -> None:
    for linear, (n, k) in ((NVFP4Linear, (28672, 8192)), (MXFP4Linear, (28672, 8192)), (NVFP4Linear, (8192, 8192))):
        dense = nn.Linear(k, n, bias=False, device="cuda", dtype=torch.bfloat16)
        module = linear(dense)
        del dense
        x = torch.randn(1, k, device="cuda", dtype=torch.bfloat16)
        module(x)
        eager = peak(functools.partial(module, x))
        mib = [value / 2**20 for value in (eager, *of_the_pass(module, x))]
        print(f"{linear.__name__} {n}x{k}: eager {mib[0]:.0f} MiB, pass {mib[1]:.0f} MiB, of which packed {mib[2]:.0f}")


def of_the_pass(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """The peak of rewriting, and the bytes of the packed copies that stay."""
    found: list[int] = []

    def backend(gm, inputs):
        held = []
        found.append(peak(lambda: held.append(rewrite(gm, inputs))))
        found.append(sum(row.outcome.nbytes for row in held[0].rows))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend)(x)
    return found[0], found[1]


def peak(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--parts", default="trace,inductor,memory")
    args = parser.parse_args()
    parts = args.parts.split(",")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads")
    if "trace" in parts or "inductor" in parts:
        costs(args.layers, "inductor" in parts)
    if "memory" in parts and torch.cuda.is_available():
        memory()


if __name__ == "__main__":
    main()
