"""Ops that nothing reads go, whether the pass bound their weights or their modules own them."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from marlin_w4a16 import PackedLinear, quantize_nvfp4
from marlin_w4a16.passes.rewrite import rewrite

OPS = torch.ops.marlin_w4a16.linear, torch.ops.marlin_w4a16.linear.default


class Unread(nn.Module):
    """Of two linears, one's result is read."""

    def __init__(self, read: nn.Module, unread: nn.Module) -> None:
        super().__init__()
        self.read, self.unread = read, unread

    def forward(self, x: Tensor) -> Tensor:
        self.unread(x)
        return self.read(x)


class InARegion(Unread):
    """The same inside a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def calls(gm: torch.fx.GraphModule) -> int:
    graphs = [module.graph for module in gm.modules() if isinstance(module, torch.fx.GraphModule)]
    return sum(node.target in OPS for graph in graphs for node in graph.nodes)


def owned(n: int = 48) -> PackedLinear:
    return PackedLinear(quantize_nvfp4(torch.randn(n, 64)))


def test_an_owned_weight_that_nothing_reads_is_no_input(trace):
    x, module = torch.randn(3, 64), Unread(owned(), owned(32))
    traced = rewrite(*trace(module, x))
    assert calls(traced.graph) == 1
    assert module.unread.multiplier.shape not in {t.shape for t in traced.inputs}
    (found,) = traced.graph(*traced.inputs)
    assert torch.equal(found, module(x))


def test_a_bound_weight_that_nothing_reads_is_not_called(trace, fp4_linear):
    x = torch.randn(3, 64)
    gm, inputs = trace(Unread(fp4_linear(), fp4_linear(32)), x)
    traced = rewrite(gm, inputs)
    assert [row.outcome.op for row in traced.rows] == ["marlin_w4a16::linear"] * 2
    assert calls(traced.graph) == 1


def test_inside_a_region_too(trace):
    assert calls(rewrite(*trace(InARegion(owned(), owned(32)), torch.randn(3, 64))).graph) == 1


def test_what_is_read_stays(trace):
    layer = owned()
    gm, inputs = trace(lambda x: (layer(x), layer(x + 1).sum()), torch.randn(3, 64))
    assert calls(gm) == calls(rewrite(gm, inputs).graph) == 2
