"""The nodes of a graph: the values they were traced with, and what they compute, run one by one."""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from marlin_w4a16.passes.graph.state import autocast_of
from marlin_w4a16.passes.graph.torch_private import size_hint, storage_key

_UNINITIALISED = frozenset(
    {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
)  # fmt: skip


def example(node: object) -> Any:
    """The fake value that Dynamo traced for a node; None of what is no node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def storage(node: fx.Node) -> Hashable | None:
    """What two nodes of a flat graph share when the tensor of one is a view of the other's.

    Calls that were traced with one body have its example values in common, so theirs do not tell the calls apart.
    """
    return cast(Hashable | None, node.meta.get("storage", storage_key(example(node))))


def is_reshaped(node: fx.Node) -> bool:
    """Whether what was traced for a node is not what it was when it was computed: see `purity.note_reshaped`."""
    return "reshaped" in node.meta


def sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape that the tensor of a node was traced with."""
    return tuple(map(size_hint, example(node).shape))


def layout(node: fx.Node) -> tuple[Any, ...]:
    """Shape, strides and storage offset that the tensor of a node was traced with."""
    value = example(node)
    return sizes(node), tuple(map(size_hint, value.stride())), size_hint(value.storage_offset())


def literals(nodes: Iterable[fx.Node]) -> list[Any]:
    """What stands in the operations of some nodes as it is, at any depth, and the nodes that they read."""
    return [value for node in nodes for value in tree_leaves((node.args, node.kwargs))]


def closure(roots: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Every node to which steps lead from some nodes, these included."""
    found: set[fx.Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(step(node))
    return found


def run(node: fx.Node, values: Mapping[fx.Node, Any], change: Callable[[Any], Any] | None = None) -> Any:
    """What a node computes.

    Args:
        node: a number that the graph takes as an input is the traced one.
        values: those of the nodes before it.
        change: what becomes of each of its arguments, at any depth; None: nothing.
    """
    if node.op == "placeholder":
        return size_hint(example(node))
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if change is not None:
        args, kwargs = tree_map(change, (args, kwargs))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def walk(
    nodes: Iterable[fx.Node],
    values: dict[fx.Node, Any],
    run: Callable[[fx.Node, Mapping[fx.Node, Any]], Any] = run,
    keep: Collection[fx.Node] | None = None,
) -> Iterator[fx.Node]:
    """Runs nodes in their order, and stops after each.

    Args:
        nodes: in graph order.
        values: those that are known by node, to which what is computed is added.
        run: what a node computes from the values before it.
        keep: the nodes whose values are wanted; others are let go after their last use. None: all.
    """
    computed = [node for node in nodes if node not in values]
    last_use: dict[fx.Node, fx.Node] = {}
    if keep is not None:
        last_use = {node: node for node in computed} | {n: node for node in computed for n in node.all_input_nodes}
    for node in computed:
        with torch.no_grad():
            values[node] = run(node, values)
        yield node
        for used in (*node.all_input_nodes, node):
            if last_use.get(used) is node and used not in (keep or ()):
                values.pop(used, None)


def evaluate(
    nodes: Iterable[fx.Node],
    known: Mapping[fx.Node, Any],
    run: Callable[[fx.Node, Mapping[fx.Node, Any]], Any] = run,
    keep: Collection[fx.Node] | None = None,
) -> dict[fx.Node, Any]:
    """The values of nodes once all of them ran, those that were known among them; see `walk`."""
    values = dict(known)
    for _ in walk(nodes, values, run, keep):
        pass
    return values


def value_of(node: fx.Node, nodes: Iterable[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
    """The value of one of some nodes in graph order once all of them ran; others are let go on the way.

    They run under the autocasts that the graph has entered there, and elements that nothing writes are no numbers.
    """
    return evaluate(nodes, known, _run_in_place, keep=(node,))[node]


def each_value(nodes: Iterable[fx.Node], known: Mapping[fx.Node, Any]) -> Iterator[tuple[fx.Node, Any]]:
    """Some nodes in graph order, and their values, as for `value_of`; each is let go after its last use."""
    values = dict(known)
    for node in walk(nodes, values, _run_in_place, keep=()):
        yield node, values[node]


def _run_in_place(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    with autocast_of(node):
        value = run(node, values)
        return _unwritten(value) if _name(node) in _UNINITIALISED else value


def _unwritten(value: Tensor) -> Tensor:
    """Fills memory as torch.use_deterministic_algorithms does, so that nothing is taken for a weight by chance."""
    if value.is_floating_point() or value.is_complex():
        return value.fill_(math.nan)
    return value.fill_(True if value.dtype == torch.bool else torch.iinfo(value.dtype).max)


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0]
