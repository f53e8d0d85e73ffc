"""Runs what was replaced once beside its traced form, on random input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find import products
from marlin_w4a16.passes.graph.constants import value_of_constant
from marlin_w4a16.passes.graph.nodes import evaluate, example, run, sizes
from marlin_w4a16.passes.graph.torch_private import size_hint
from marlin_w4a16.passes.graph.traced import Traced
from marlin_w4a16.passes.judge.weights import Weight
from marlin_w4a16.passes.mixture.trial import Proved, as_op, random_tokens


def worst_error(
    judged: Weight,
    product: products.Product,
    operands: dict[str, Any],
    written: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    packed: PackedFP4,
) -> float:
    """The relative L2 difference of what was written from a product of ``operands``, ``"routing"`` among them."""
    weight = example(product.weight_node)
    values: dict[fx.Node, Any] = {}
    for name, operand in operands.items():
        if not isinstance(operand, fx.Node):
            continue
        like = example(operand)
        if not isinstance(like, Tensor):
            values[operand] = size_hint(like)
            continue
        values[operand] = torch.randn(sizes(operand), device=weight.device).to(like.dtype)
        if name in ("routing", "offs"):
            values[operand] = _routing(product, sizes(operand)).to(like.device, like.dtype)
    flat = products.operands_of(product, product.node)
    traced = {node: values[operands[name]] for name, node in flat.items() if isinstance(node, fx.Node)}
    dense = judged.decode.traced(judged.values)
    if product.route is not None and product.route.by == "ids":
        dense = dense[values[operands["routing"]]]
    traced[products.named_arguments(product.node, product.spelling)[product.weight]] = dense
    values.update(zip(inputs, (packed.words, packed.scales, packed.multiplier), strict=True))
    dtype = example(product.node).dtype
    with torch.no_grad(), torch.autocast(weight.device.type, dtype, enabled=dtype != weight.dtype):
        expected = run(product.node, traced)
        found = evaluate(written, values)[written[-1]]
    return distance(found, expected)


def mixture_error(proved: Proved, weights: Sequence[Weight], packed: Sequence[PackedFP4], traced: Traced) -> float:
    """The relative L2 difference of a mixture from its traced form, on random tokens in the dtypes of the model."""
    m = proved.mixture
    given = random_tokens(m, example(m.x).device, torch.Generator().manual_seed(0))
    values: dict[fx.Node, Any] = {node: value.to(example(node).dtype) for node, value in given.items()}
    values |= {node: value_of_constant(node, traced.constants, traced.live) for node in m.constants}
    for node in m.shapes:
        like = example(node)
        values[node] = torch.zeros(sizes(node), dtype=like.dtype, device=like.device)
    for product, weight in zip((m.first, m.second), weights, strict=True):
        values[product.weight_node] = weight.decode.traced(weight.values)
    values = evaluate(m.nodes, values)
    with torch.no_grad():
        found = as_op(proved, packed[0], packed[1], values)
    return distance(found, values[m.output])


def distance(found: Tensor, expected: Tensor) -> float:
    """The relative L2 difference."""
    error, size = (found.double() - expected.double()).norm(), expected.double().norm()
    return float(error / size) if bool(size) else float(found.double().norm())


def _routing(product: products.Product, shape: tuple[int, ...]) -> Tensor:
    """Random ids, or offsets of groups that have all rows of x."""
    experts = product.matrices.batch
    if product.route is not None and product.route.by == "ids":
        return torch.randint(experts, shape, device="cpu")
    rows = sizes(product.x_node)[0]
    ends = torch.randint(rows + 1, shape, device="cpu").sort().values
    ends[-1] = rows
    return ends
