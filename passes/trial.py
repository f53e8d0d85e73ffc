"""Runs a replaced product once beside its traced form, on random input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes import products
from marlin_w4a16.passes.constants import example, run
from marlin_w4a16.passes.decode import Decode
from marlin_w4a16.passes.torch_private import size_hint


def worst_error(
    decode: Decode,
    leaves: Sequence[Tensor],
    product: products.Product,
    operands: dict[str, Any],
    written: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    packed: Sequence[PackedFP4],
) -> float:
    """The relative L2 difference of what was written from the product, which reads ``operands``."""
    weight = example(product.weight_node)
    values: dict[fx.Node, Any] = {}
    for operand in (o for o in operands.values() if isinstance(o, fx.Node)):
        like = example(operand)
        if not isinstance(like, Tensor):
            values[operand] = size_hint(like)
            continue
        shape = [size_hint(size) for size in like.shape]
        values[operand] = torch.randn(shape, device=weight.device).to(like.dtype)
    pairs = zip(products.operands_of(product, product.node).values(), operands.values(), strict=True)
    traced = {flat: values[own] for flat, own in pairs if isinstance(own, fx.Node)}
    traced[product.weight_node] = decode.traced(leaves)
    members = [t for matrix in packed for t in (matrix.words, matrix.scales, matrix.multiplier)]
    values.update(zip(inputs, members, strict=True))
    dtype = example(product.node).dtype
    with torch.no_grad(), torch.autocast(weight.device.type, dtype, enabled=dtype != weight.dtype):
        expected = run(product.node, traced)
        for node in written:
            values[node] = run(node, values)
    found = values[written[-1]].double()
    size = expected.double().norm()
    return float((found - expected.double()).norm() / size) if bool(size) else float(found.norm())
