"""What a graph shows of the ids of a mixture: whether a router chose them, and whether no token has one twice."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from marlin_w4a16.passes.graph.flow import Flow
from marlin_w4a16.passes.graph.nodes import example

_MOVED = frozenset({"to", "long", "int", "view", "reshape", "contiguous", "flatten", "clone", "detach"})
_TOP, _SORT = (torch.topk, "topk"), (torch.sort, "sort")
_WIDE = (torch.int64, torch.int32)


def are_ranks(ids: fx.Node, experts: int, flow: Flow) -> bool:
    """Whether ids are places among as many scores as there are experts, or fewer: what a router chooses."""
    places = list(_moved(ids))
    ranked = _ranked(places[-1], (*_TOP, *_SORT))
    if ranked is None or any(example(node).dtype not in _WIDE for node in places) or flow.is_ever_written(places):
        return False
    scores = example(ranked.args[0] if ranked.args else ranked.kwargs["input"])
    position, dim = 2 if ranked.target in _TOP else 1, ranked.kwargs.get("dim", -1)
    dim = ranked.args[position] if len(ranked.args) > position else dim
    return isinstance(dim, int) and isinstance(scores.shape[dim], int) and scores.shape[dim] <= experts


def are_distinct(ids: fx.Node, flow: Flow) -> bool:
    """Whether no token has an expert twice: they are what ``topk`` chooses."""
    top = _ranked(ids, _TOP)
    if top is None or flow.is_ever_written([ids]):
        return False
    given = dict(zip(("input", "k", "dim"), top.args, strict=False)) | top.kwargs
    return given.get("dim", -1) in (-1, 1)


def _moved(ids: fx.Node) -> Iterator[fx.Node]:
    """Ids, and what they were before they were moved or cast."""
    node: Any = ids
    yield node
    while node.op == "call_method" and node.target in _MOVED and isinstance(node.args[0], fx.Node):
        if node.target == "view" and any(isinstance(argument, torch.dtype) for argument in node.args):
            return
        node = node.args[0]
        yield node


def _ranked(node: fx.Node, by: tuple[Any, ...]) -> fx.Node | None:
    """What gives a node as its indices."""
    found = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return found if isinstance(found, fx.Node) and found.target in by else None
