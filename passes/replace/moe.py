"""Replaces proved mixtures of experts by ``marlin_w4a16::moe``."""

from collections.abc import Callable, Sequence

import torch
from torch import fx

from marlin_w4a16.fake_impls.library import format_args
from marlin_w4a16.fake_impls.moe import activation_args
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.mixture.stacks import paired
from marlin_w4a16.passes.mixture.trial import Proved
from marlin_w4a16.passes.replace.linear import laid_out, writer

_OP = torch.ops.marlin_w4a16.moe.default


def replace(
    proved: Proved,
    reach: Callable[[fx.Node], fx.Node],
    packed: Sequence[PackedFP4],
    inputs: Sequence[Sequence[fx.Node]],
) -> None:
    """Puts the op in the place of a mixture; ``inputs`` are the nodes of words, scales and multiplier of each weight.

    ``reach`` gives the node of the graph that is rewritten for one of the mixture's.
    """
    m = proved.mixture
    output = reach(m.output)
    call = writer(output, [])
    dtype = example(m.first.x_node).dtype  # what the experts are computed in
    x, ids = reach(m.x), reach(m.ids)
    if example(x).dtype != dtype:
        x = call(torch.Tensor.to, x, dtype)
    weights = reach(m.weights)
    if proved.read_scores and m.scores is not None:
        weights = call(torch.gather, reach(m.scores), 1, ids)
    ids = proved.negatives.applied(call, ids, m.experts)
    bias13, bias2 = (None if bias is None else reach(bias) for bias in (m.bias13, m.bias2))
    if bias13 is not None and proved.order is not None:
        bias13 = paired(bias13, proved.order, call)
    stacks = [argument for one, nodes in zip(packed, inputs, strict=True) for argument in (*nodes, *format_args(one))]
    activation = activation_args(proved.activation)
    y = call(_OP, x, weights, ids, *stacks, bias13, bias2, *activation, m.on_input, None)
    if example(y).dtype != example(output).dtype:
        y = call(torch.Tensor.to, y, example(output).dtype)
    y = laid_out(call, y, output)
    for node in map(reach, m.outputs):
        node.replace_all_uses_with(y, delete_user_cb=lambda user: user > y)
