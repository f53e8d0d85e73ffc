"""Counters of CUDA graphs under mode="reduce-overhead": every case must be right, with no skip.

python benchmarks/cuda_graphs.py
"""

from collections.abc import Iterator
from typing import Any

import torch
from overhead import NVFP4Linear
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._dynamo.utils import counters

from marlin_w4a16 import PackedLinear, quantize_nvfp4, refresh

MODE: dict[str, Any] = {"backend": "marlin_w4a16", "mode": "reduce-overhead"}


def model(layers: int = 2, packed: bool = False) -> nn.Module:
    def linear() -> nn.Module:
        return PackedLinear(quantize_nvfp4(torch.randn(512, 512, device="cuda"))) if packed else NVFP4Linear(512, 512)

    return nn.Sequential(*(linear() for _ in range(layers)))


def tokens(m: int) -> Tensor:
    return torch.randn(m, 512, device="cuda", dtype=torch.bfloat16) * 0.04


Pairs = Iterator[tuple[Tensor, Tensor]]


def whole_model(packed: bool = False) -> Pairs:
    net = model(packed=packed)
    run = torch.compile(net, **MODE)
    for _ in range(8):
        x = tokens(4)
        yield run(x), net(x)


def two_instances() -> Pairs:
    run, nets = torch.compile(lambda net, x: net(x), **MODE), (model(), model())
    for _ in range(4):
        for net in nets:
            x = tokens(4)
            yield run(net, x), net(x)


def six_layers_one_by_one() -> Pairs:
    layers = list(model(6))
    compiled = [torch.compile(layer, **MODE) for layer in layers]
    for _ in range(4):
        x = tokens(4)
        for run, layer in zip(compiled, layers, strict=True):
            yield run(x), layer(x)


def loads_between_replays(packed: bool = False) -> Pairs:
    net, others = model(packed=packed), [model(packed=packed) for _ in range(3)]
    run = torch.compile(net, **MODE)
    for other in others:
        net.load_state_dict(other.state_dict())
        for _ in range(3):
            x = tokens(4)
            yield run(x), other(x)


def writes_that_nothing_sees() -> Pairs:
    net = model()
    run = torch.compile(net, **MODE)
    for _ in range(3):
        net[0].codes.data.copy_(net[0].codes.roll(1, 0))
        refresh(net)
        for _ in range(3):
            x = tokens(4)
            yield run(x), net(x)


def changing_batch_sizes(dynamic: bool | None) -> Pairs:
    net = model()
    run = torch.compile(net, dynamic=dynamic, **MODE)
    for _ in range(4):
        for m in (1, 4, 16, 40):
            x = tokens(m)
            yield run(x), net(x)


CASES = {
    "whole model": whole_model,
    "two instances through one function": two_instances,
    "six layers, each compiled": six_layers_one_by_one,
    "load_state_dict between replays": loads_between_replays,
    "unseen writes, refresh()": writes_that_nothing_sees,
    "batch sizes 1, 4, 16, 40, static": lambda: changing_batch_sizes(False),
    "batch sizes 1, 4, 16, 40, automatic": lambda: changing_batch_sizes(None),
    "packed modules": lambda: whole_model(True),
    "packed modules, load_state_dict": lambda: loads_between_replays(True),
}


def recorded() -> int:
    """CUDA graphs recorded so far."""
    manager = torch._inductor.cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return int(repr(manager.graph_counter).strip("count()")) if manager else 0


@torch.no_grad()
def main() -> None:
    table = Table(title=f"reduce-overhead, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for column in ("case", "calls", "right", "graphs recorded", "cudagraph_skips"):
        table.add_column(column)
    for name, case in CASES.items():
        torch._dynamo.reset()
        torch._inductor.cudagraph_trees.reset_cudagraph_trees()
        counters.clear()
        torch.manual_seed(0)
        right = []
        for out, expected in case():
            found = out.clone().double()
            right.append(((found - expected.double()).norm() <= 6e-3 * expected.double().norm()).item())
            torch.compiler.cudagraph_mark_step_begin()
        graphs, skips = recorded(), counters["inductor"]["cudagraph_skips"]
        table.add_row(name, str(len(right)), str(sum(right)), str(graphs), str(skips))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
