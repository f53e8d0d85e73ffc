"""Replaces products with FP4 weights by ``marlin_w4a16::linear`` and ``grouped_linear``."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

import marlin_w4a16.fake_impls.grouped_linear
import marlin_w4a16.fake_impls.linear  # noqa: F401, it defines the op
from marlin_w4a16.fake_impls.library import format_args
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import Product, is_bias, named_arguments
from marlin_w4a16.passes.find.routes import Call, as_rows, from_rows, multiply, ordered
from marlin_w4a16.passes.graph.nodes import example, layout
from marlin_w4a16.passes.graph.torch_private import fake_result

_OP = torch.ops.marlin_w4a16.linear.default
_GROUPED_OP = torch.ops.marlin_w4a16.grouped_linear.default


def replace(
    product: Product, node: fx.Node, packed: PackedFP4, inputs: Sequence[fx.Node], x: fx.Node, routing: fx.Node | None
) -> list[fx.Node]:
    """Puts ops in the place of ``node``, the product's copy in the graph that is rewritten; the last is the result.

    Args:
        packed: the weight, a stack if the product is routed.
        inputs: the nodes of words, scales and multiplier.
        x: the input, of the shape and dtype of that of the product.
        routing: the offsets or ids of a routed product.
    """
    written: list[fx.Node] = []
    dtype = example(node).dtype
    call = writer(node, written)

    def by_op(op: Callable[..., Any], x: fx.Node, last: fx.Node | None) -> Any:
        return call(op, x, *inputs, *format_args(packed), last)

    operands = named_arguments(node, product.spelling)
    for axis in reversed(product.x_first):
        x = call(torch.select, x, axis, 0)
    added = operands.get(product.spelling.added) if product.spelling.added else None
    bias = added if is_bias(product, operands) else None
    y = _grouped(call, by_op, product, x, routing) if product.routed else _single(call, by_op, product, x, bias)
    if added is not None and bias is None:
        alpha, beta = operands.get("alpha", 1), operands.get("beta", 1)
        y = y if alpha == 1 else call(torch.mul, y, alpha)
        if beta != 0:  # what is multiplied by zero is not read, so that its NaN does not spread
            y = call(torch.add, y, added, alpha=beta)
        if example(y).dtype != dtype:
            y = call(torch.Tensor.to, y, dtype)
    y = laid_out(call, y, node)
    node.replace_all_uses_with(y)
    node.graph.erase_node(node)
    return written


def laid_out(call: Call, y: Any, node: fx.Node) -> Any:
    """A result with the strides of the one that was traced: what follows may view it, or ask for its strides."""
    shape, strides, _ = layout(node)
    if layout(y)[1] == strides:
        return y
    order = sorted(range(len(shape)), key=lambda axis: (strides[axis], shape[axis]), reverse=True)
    y = call(torch.Tensor.contiguous, call(torch.permute, y, tuple(order)))
    return call(torch.permute, y, tuple(order.index(axis) for axis in range(len(shape))))


def _single(call: Call, by_op: Callable[..., Any], product: Product, x: Any, bias: Any) -> Any:
    """The product with one matrix."""
    axes = product.equation
    x = ordered(call, x, axes.x, axes.free + axes.columns)
    if len(axes.columns) > 1:
        x = call(torch.flatten, x, -len(axes.columns))
    y = by_op(_OP, x, bias)
    if len(axes.rows) > 1:
        y = call(torch.unflatten, y, -1, product.matrices.sizes)
    return ordered(call, y, axes.free + axes.rows, axes.out)


def _grouped(call: Call, by_op: Callable[..., Any], product: Product, x: Any, routing: Any) -> Any:
    """The product with a stack, each matrix for some of the rows of x."""
    axes, matrices = product.equation, product.matrices
    batch = len(axes.batch)
    rows, lead = as_rows(call, axes, x)
    each: Any = 1
    for size in lead[batch:]:
        each = size if isinstance(each, int) and each == 1 else call(operator.mul, each, size)
    linear = functools.partial(by_op, _GROUPED_OP)
    y = multiply(call, linear, product.route, rows, routing, matrices.batch, each)
    return from_rows(call, axes, matrices.sizes[1 if product.route else batch :], lead, y)


def writer(node: fx.Node, written: list[fx.Node]) -> Call:
    """What adds calls to the graph of a node, before it, and to ``written``; numbers that are known are given as such.

    The meta of the node, and under autocast its dtype, are those of the calls.
    """

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if target is getattr:
            return getattr(example(args[0]), args[1])
        with node.graph.inserting_before(node):
            new = node.graph.call_function(target, args, kwargs)
        value = fake_result(new, node)
        if isinstance(value, int):
            node.graph.erase_node(new)
            return value
        if target in (_OP, _GROUPED_OP):
            value = value.to(example(node).dtype)  # as autocast chooses
        new.meta = {**node.meta, "example_value": value}
        written.append(new)
        return new

    return call
