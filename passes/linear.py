"""Replaces products with FP4 weights by ``marlin_w4a16::linear``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from marlin_w4a16.fake_impls.library import DTYPES, format_args
from marlin_w4a16.fake_impls.linear import uses_triton
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.constants import example
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.products import Product, arguments_of, is_bias
from marlin_w4a16.passes.torch_private import fake_result

_OP = torch.ops.marlin_w4a16.linear.default


def find_packed(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The calls of ``marlin_w4a16::linear`` that were traced as such, by the node of their packed words."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in (torch.ops.marlin_w4a16.linear, torch.ops.marlin_w4a16.linear.default):
            found.setdefault(node.args[1], []).append(node)
    return found


def serves(device: torch.device) -> Rejected | str:
    """The kernel that runs linears of a device, or why they are left alone there."""
    if device.type == "cpu":
        return "CPU blocks"
    if device.type != "cuda":
        return Rejected(f"device {device.type}: expected cuda or cpu")
    if uses_triton(device):
        return "Triton"
    major, minor = torch.cuda.get_device_capability(device)
    why = "it has FP4 tensor cores of its own" if major >= 10 else "the kernels need 8.0"
    return Rejected(f"device of capability {major}.{minor}: {why}")


def compute_dtype(products: Sequence[Product]) -> torch.dtype:
    """What products of one weight are computed in (under autocast not the dtype of their operands), narrowest first."""
    dtypes = {example(product.node).dtype for product in products}
    return next(dtype for dtype in DTYPES if dtype in dtypes)


def replace(
    product: Product, node: fx.Node, packed: Sequence[PackedFP4], inputs: Sequence[fx.Node], x: fx.Node
) -> list[fx.Node]:
    """Puts ops in the place of ``node``, the product's copy in the graph that is rewritten.

    Args:
        product: what is replaced.
        node: its copy.
        packed: the weight for each index of the batch.
        inputs: the nodes of words, scales and multiplier of each of them.
        x: the input, of the shape and dtype of that of the product.

    Returns:
        What was written; the last one is the result.
    """
    written: list[fx.Node] = []
    dtype = example(node).dtype

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        with node.graph.inserting_before(node):
            new = node.graph.call_function(target, args, kwargs)
        value = fake_result(new)
        new.meta = {**node.meta, "example_value": value.to(dtype) if target is _OP else value}  # as autocast chooses
        written.append(new)
        return new

    operands, axes = arguments_of(node, product.form), product.equation
    for axis in reversed(product.x_first):
        x = call(torch.select, x, axis, 0)
    x = _ordered(call, x, axes.x, axes.batch + axes.free + axes.columns)
    if len(axes.columns) > 1:
        x = call(torch.flatten, x, -len(axes.columns))
    if len(axes.batch) > 1:
        x = call(torch.flatten, x, 0, len(axes.batch) - 1)
    added = operands.get(product.form.added) if product.form.added else None
    bias = added if is_bias(product, operands) else None
    rows = []
    for index, weight in enumerate(packed):
        part = call(torch.select, x, 0, index) if axes.batch else x
        rows.append(call(_OP, part, *inputs[3 * index : 3 * index + 3], *format_args(weight), bias))
    y = call(torch.stack, rows) if axes.batch else rows[0]
    sizes = product.matrices.sizes
    if len(axes.batch) > 1:
        y = call(torch.unflatten, y, 0, sizes[: len(axes.batch)])
    if len(axes.rows) > 1:
        y = call(torch.unflatten, y, -1, sizes[len(axes.batch) :])
    y = _ordered(call, y, axes.batch + axes.free + axes.rows, axes.out)
    if added is not None and bias is None:
        alpha, beta = operands.get("alpha", 1), operands.get("beta", 1)
        y = y if alpha == 1 else call(torch.mul, y, alpha)
        if beta != 0:  # what is multiplied by zero is not read, so that its NaN does not spread
            y = call(torch.add, y, added, alpha=beta)
        if example(y).dtype != dtype:
            y = call(torch.Tensor.to, y, dtype)
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)
    return written


def _ordered(call: Callable[..., fx.Node], tensor: fx.Node, labels: str, wanted: str) -> fx.Node:
    if labels == wanted:
        return tensor
    return call(torch.permute, tensor, tuple(labels.index(label) for label in wanted))
