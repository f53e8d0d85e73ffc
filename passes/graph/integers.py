"""Integers that a graph only counts, such as the lengths of a cache, taken out of it and computed in Python.

Dynamo makes an input of an integer that changes between calls, and an output of what becomes of it. A CUDA graph is
recorded for each value of such an input, whether a kernel reads it or not (`int_key` in
torch/_inductor/cudagraph_trees.py, 2.11 to 2.13): the sliding-window caches of transformers would record one at every
token.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from marlin_w4a16.passes.graph import torch_private
from marlin_w4a16.passes.graph.torch_private import graph_copy


def compile_graph(gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    """Hands a graph to Inductor; where its settings ask for CUDA graphs, without integers that are only counted."""
    found = take_out(gm) if patches.get("triton.cudagraphs") else None
    if found is None:
        return torch_private.compile_graph(gm, list(inputs), patches)
    graph, counting, taken, places = found
    kept = sorted(set(range(len(inputs))).difference(taken))
    compiled = torch_private.compile_graph(graph, [inputs[i] for i in kept], patches)

    def call(*args: Any) -> Any:
        counts = counting(*[args[i] for i in taken])
        out = list(compiled(*[args[i] for i in kept]))
        for place, count in zip(places, counts, strict=True):  # ascending
            out.insert(place, count)
        return tuple(out)

    return call


def take_out(gm: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule, list[int], list[int]] | None:
    """The graph without the integers that it only counts, or None where there are none.

    Returns:
        The graph that is left; one that maps the integers to what becomes of them; the positions of these inputs; and
        those of these outputs, ascending.
    """
    output: Any = gm.graph.output_node()
    outputs = output.args[0]
    if not isinstance(outputs, tuple | list):
        return None
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    of: dict[fx.Node, set[fx.Node]] = {}  # integers, and the inputs that they are made from
    for node in gm.graph.nodes:
        inner = node.all_input_nodes
        if _is_int(node) and (node in placeholders or (node.op == "call_function" and all(n in of for n in inner))):
            of[node] = {node} if node in placeholders else {p for n in inner for p in of[n]}
    readers = (node for node in gm.graph.nodes if node not in of and node is not output)
    read = {p for node in readers for n in node.all_input_nodes if n in of for p in of[n]}
    while more := {p for n in outputs if n in of and of[n] & read for p in of[n]} - read:  # such an output stays, too
        read |= more
    taken = [i for i, node in enumerate(placeholders) if node in of and node not in read]
    places = [i for i, node in enumerate(outputs) if node in of and of[node] and not of[node] & read]
    if not taken:
        return None
    counting = _counting(gm, [placeholders[i] for i in taken], [outputs[i] for i in places])
    return _without(gm, taken, places), counting, taken, places


def _is_int(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), int | torch.SymInt)


def _without(gm: fx.GraphModule, taken: Iterable[int], places: Iterable[int]) -> fx.GraphModule:
    graph, _ = graph_copy(gm)
    output: Any = graph.graph.output_node()
    output.args = (tuple(out for i, out in enumerate(output.args[0]) if i not in set(places)),)
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    gone = {placeholders[i] for i in taken}
    for node in reversed(list(graph.graph.nodes)):
        if not node.users and node is not output and (node in gone or (_is_int(node) and node.op == "call_function")):
            graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return graph


def _counting(gm: fx.GraphModule, inputs: list[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    values = {node: graph.placeholder(node.name) for node in inputs}
    for node in gm.graph.nodes:
        made = node not in values and node.op == "call_function" and _is_int(node)
        if made and all(n in values for n in node.all_input_nodes):
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[node] for node in results))
    graph.eliminate_dead_code()
    return fx.GraphModule({}, graph)
