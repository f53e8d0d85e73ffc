"""How the rows of a product find their matrix of a stack, and the rows of a product as one matrix."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.passes.find.equation import Equation, Matrices
from marlin_w4a16.passes.graph.constants import Constants
from marlin_w4a16.passes.graph.nodes import example

Call = Callable[..., Any]  # computes, or adds to a graph, what a function gives


@dataclass(frozen=True, slots=True)
class Route:
    """Where the matrices of a routed product come from, where its equation does not say it all.

    Attributes:
        by: the name of the operand that routes: ``"offsets"``, the end of the rows of each matrix, or ``"ids"``, the
            matrix of each row.
        node: that operand.
        stack: the node of the stack.
        reader: what reads the stack: the product, or what gathers for it.
    """

    by: str
    node: fx.Node
    stack: fx.Node
    reader: fx.Node


def at_once(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The `Call` that computes."""
    return target(*args, **kwargs)


def gathered(node: fx.Node, constants: Constants) -> Route | None:
    """The route of a product whose weight is ``stack[ids]`` of a constant stack and ids that are computed."""
    if node in constants:
        return None
    given = dict(zip(("input", "dim", "index"), node.args, strict=False)) | node.kwargs
    if node.target is operator.getitem:
        stack, ids = node.args
    elif node.target in (torch.index_select, "index_select") and given.get("dim") == 0:
        stack, ids = given.get("input"), given.get("index")
    else:
        return None
    if isinstance(ids, tuple) and len(ids) == 1:
        (ids,) = ids
    if not (isinstance(stack, fx.Node) and isinstance(ids, fx.Node) and stack in constants):
        return None
    weight, index = example(stack), example(ids)
    if not (isinstance(weight, Tensor) and isinstance(index, Tensor) and weight.ndim == 3 and index.ndim > 0):
        return None
    if index.dtype not in (torch.int64, torch.int32) or not weight.dtype.is_floating_point:
        return None
    return Route("ids", ids, stack, node)


def grouped_matrices(weight: Tensor) -> tuple[Equation, Matrices]:
    """Of ``grouped_mm`` of ``[rows, k]`` by ``[experts, k, n]``."""
    experts, k, n = weight.shape
    return Equation("mk", "Ekn", "mn"), Matrices((), (0, 2, 1), experts, n, k, (experts, n))


def gathered_matrices(axes: Equation, ids: Tensor, weight: Tensor) -> Matrices | str:
    """The matrices of a stack that is gathered by ids, whose axes are the first of the product's weight; or why not."""
    lead, rest = axes.weight[: ids.ndim], axes.weight[ids.ndim :]
    rows, columns = (
        tuple(rest.index(label) for label in labels if label in rest) for labels in (axes.rows, axes.columns)
    )
    if axes.refusal() is not None or axes.batch != lead or len(rows) != 1 or len(columns) != 1:
        return f"{axes} of a stack that is gathered along {lead}"
    (row,), (column,) = rows, columns
    experts, n, k = weight.shape[0], weight.shape[1 + row], weight.shape[1 + column]
    return Matrices((), (0, 1 + row, 1 + column), experts, n, k, (experts, n))


def as_rows(call: Call, axes: Equation, x: Any) -> tuple[Any, list[Any]]:
    """The input of a routed product as ``[rows, k]``, and the sizes of the axes that are rows: batch, then free."""
    x = ordered(call, x, axes.x, axes.batch + axes.free + axes.columns)
    if len(axes.columns) > 1:
        x = call(torch.flatten, x, -len(axes.columns))
    lead = [call(torch.Tensor.size, x, axis) for axis in range(len(axes.batch + axes.free))]
    return (call(torch.flatten, x, 0, len(lead) - 1) if len(lead) > 1 else x), lead


def from_rows(call: Call, axes: Equation, sizes: tuple[int, ...], lead: list[Any], y: Any) -> Any:
    """The output of a routed product from its rows ``[rows, n]``; ``sizes`` are those of the weight's row axes."""
    if len(axes.rows) > 1:
        y = call(torch.unflatten, y, -1, sizes)
    if len(lead) > 1:
        y = call(torch.unflatten, y, 0, tuple(lead))
    return ordered(call, y, axes.batch + axes.free + axes.rows, axes.out)


def ordered(call: Call, tensor: Any, labels: str, wanted: str) -> Any:
    """A tensor with its labelled axes in another order."""
    if labels == wanted:
        return tensor
    return call(torch.permute, tensor, tuple(labels.index(label) for label in wanted))


def multiply(
    call: Call, linear: Callable[[Any, Any], Any], route: Route | None, x: Any, routing: Any, experts: int, each: Any
) -> Any:
    """Rows ``[rows, k]`` times the matrices, of which there are ``experts``, that belong to them.

    Args:
        call: see `Call`.
        linear: of rows that are sorted by matrix and the end of the rows of each.
        route: how they belong; None for a batch: as many rows for each matrix, in order.
        routing: the offsets or ids of the route.
        each: rows of each matrix in a batch, or of each id.
    """
    if route is not None and route.by == "offsets":
        return linear(x, routing)
    every = call(torch.arange, experts, device=call(getattr, x, "device"))
    if route is None:
        return linear(x, call(torch.mul, call(torch.add, every, 1), each))
    ids = call(torch.remainder, call(torch.flatten, routing), experts)  # as indexing takes them: -1 is the last
    if each != 1:
        ids = call(torch.repeat_interleave, ids, each)
    chosen = call(torch.sort, ids)
    ids, order = call(operator.getitem, chosen, 0), call(operator.getitem, chosen, 1)
    y = linear(call(torch.index_select, x, 0, order), call(torch.searchsorted, ids, every, right=True))
    return call(torch.index_copy, call(torch.empty_like, y), 0, order, y)
