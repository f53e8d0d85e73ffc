"""Operations that pass a value on, and those that put values together."""

from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.passes.graph.nodes import example, storage

JOINS: dict[Any, int] = {torch.cat: 0, torch.concat: 0, torch.stack: 0, torch.vstack: 0, torch.hstack: 1}
_CASTS = frozenset({"to", "float", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach"})


def flat(tensors: Any, axis: int) -> list[Any]:
    """What is joined along an axis, with what concatenations among it join along the same one in their place."""
    found, todo = [], list(reversed(tensors))
    while todo:
        last = todo.pop()
        inner = joined(last) if isinstance(last, fx.Node) and last.target in (torch.cat, torch.concat) else None
        if inner is not None and inner[1] == axis and isinstance(inner[0], list | tuple):
            todo += reversed(inner[0])
        else:
            found.append(last)
    return found


def joined(node: fx.Node) -> tuple[Any, int]:
    """What a concatenation or a stack joins, and along which axis."""
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    return given["tensors"], given.get("dim", given.get("axis", JOINS[node.target])) % example(node).ndim


def is_cast(node: fx.Node) -> bool:
    """Whether a node is a method that gives the same elements, in another dtype or another place."""
    return node.op == "call_method" and node.target in _CASTS and bool(node.all_input_nodes)


def is_transpose(node: fx.Node) -> bool:
    """Whether a node gives a matrix with its axes exchanged, as a view."""
    if node.op not in ("call_method", "call_function") or not node.all_input_nodes:
        return False
    before, after = example(node.all_input_nodes[0]), example(node)
    if not (isinstance(before, Tensor) and isinstance(after, Tensor) and before.ndim == after.ndim == 2):
        return False
    return storage(node) == storage(node.all_input_nodes[0]) and after.stride() == before.stride()[::-1]
