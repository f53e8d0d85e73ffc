"""The nodes of a graph: the values they were traced with, and what they compute, run one by one."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from marlin_w4a16.passes.graph.torch_private import size_hint, storage_key


def example(node: object) -> Any:
    """The fake value that Dynamo traced for a node; None of what is no node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def storage(node: fx.Node) -> Hashable | None:
    """What two nodes of a flat graph share when the tensor of one is a view of the other's.

    Calls that were traced with one body have its example values in common, so theirs do not tell the calls apart.
    """
    return cast(Hashable | None, node.meta.get("storage", storage_key(example(node))))


def sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape that the tensor of a node was traced with."""
    return tuple(map(size_hint, example(node).shape))


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


def evaluate(
    nodes: Iterable[fx.Node],
    known: Mapping[fx.Node, Any],
    run: Callable[[fx.Node, Mapping[fx.Node, Any]], Any] = run,
    keep: Collection[fx.Node] | None = None,
) -> dict[fx.Node, Any]:
    """Runs nodes in their order, and returns the values, those that were known among them.

    Args:
        nodes: in graph order.
        known: values that are there already, by node.
        run: what a node computes from the values before it.
        keep: the nodes whose values are wanted; others are let go after their last use. None: all.
    """
    computed = [node for node in nodes if node not in known]
    last_use = {used: node for node in computed for used in node.all_input_nodes} if keep is not None else {}
    values = dict(known)
    with torch.no_grad():
        for node in computed:
            values[node] = run(node, values)
            for used in node.all_input_nodes:
                if last_use.get(used) is node and used not in (keep or ()):
                    del values[used]
    return values


def value_of(node: fx.Node, nodes: Iterable[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
    """The value of one of some nodes in graph order once all of them ran; others are let go on the way."""
    return evaluate(nodes, known, keep=(node,))[node]
