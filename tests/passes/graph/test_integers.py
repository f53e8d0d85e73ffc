"""Integers that a graph only counts."""

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import PackedLinear, quantize_nvfp4
from marlin_w4a16.passes.graph.integers import take_out


class Cache:
    def __init__(self) -> None:
        self.seen, self.steps = 0, 0


class Decoder(nn.Module):
    """Counts in Python what it has seen, as the sliding caches of transformers do."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.linear = PackedLinear(quantize_nvfp4(torch.randn(32, 32)))
        self.reads = reads

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        if self.reads:
            y = y * cache.seen
        cache.seen += x.shape[0]
        cache.steps = cache.seen * 2 + cache.steps
        return y, y + 1


def graphs_of(model: nn.Module) -> list:
    """The graphs that Dynamo makes when the counts change."""
    found = []

    def keep(gm, inputs):
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    compiled, cache = torch.compile(model, backend=keep), Cache()
    for _ in range(3):
        compiled(torch.randn(2, 32), cache)
    return found


def test_counts_are_inputs_and_outputs_no_more():
    first, *_, last = graphs_of(Decoder())
    assert take_out(first) is None  # integers are constants at first
    graph, counting, taken, places = take_out(last)
    assert len(taken) == len(places) == 2
    inputs = {node.name for node in last.graph.find_nodes(op="placeholder")}
    left = {node.name for node in graph.graph.find_nodes(op="placeholder")}
    assert left < inputs and len(inputs - left) == 2
    assert sorted(counting(*([10, 3] if "seen" in list(last.graph.nodes)[taken[0]].name else [3, 10]))) == [12, 27]


def test_what_a_kernel_reads_stays():
    *_, last = graphs_of(Decoder(reads=True))
    found = take_out(last)
    names = [node.name for node in last.graph.find_nodes(op="placeholder")]
    assert found is None or all("seen" not in names[i] for i in found[2])


@pytest.mark.parametrize("reads", [False, True])
def test_compiled_calls_count_on(reads):
    torch._dynamo.reset()
    model = Decoder(reads)
    compiled = torch.compile(model, backend="marlin_w4a16", mode="reduce-overhead")
    plain, cache = Cache(), Cache()
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(2, 32)
            expected, found = model(x, plain), compiled(x, cache)
            assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
            assert vars(cache) == vars(plain)
    assert cache.seen == 10
