"""Regions of a traced graph, such as checkpoints: analysed as one graph with the rest, edited where they stand."""

import operator
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from marlin_w4a16.passes.graph.nodes import example, storage
from marlin_w4a16.passes.graph.torch_private import copy_source, graph_copy, region_operands, storage_key


@dataclass(frozen=True, slots=True)
class Flat:
    """A graph for analysis, in which the body of each region stands in the place of its call.

    Attributes:
        graph: the graph; its placeholders are those of the whole, in order.
        origin: the node of the whole that each of its nodes stands for.
    """

    graph: fx.Graph
    origin: dict[fx.Node, fx.Node]


class Regions:
    """A copy ``gm`` of a graph from Dynamo to be edited: each call of a region has its own body until `finish`."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, _ = graph_copy(gm)
        self._calls: dict[fx.Graph, fx.Node] = {}
        self._bodies: dict[fx.Node, fx.GraphModule] = {}
        self._traced: dict[fx.Node, fx.GraphModule] = {}
        self._separate(self.gm)

    @property
    def graphs(self) -> list[fx.Graph]:
        """The whole and, from the outermost in, the bodies of its regions."""
        return [self.gm.graph, *self._calls]

    def flatten(self) -> Flat:
        """The copy, as it is now, in one graph."""
        flat = Flat(fx.Graph(), {})
        self._expand(self.gm.graph, flat, {}, {})
        return flat

    def reach(self, node: fx.Node, graph: fx.Graph) -> fx.Node:
        """Returns a node as it is seen in ``graph``, that of a region further in: as an operand, added if need be."""
        if node.graph is graph:
            return node
        call = self._calls[graph]
        outer = self.reach(node, call.graph)
        placeholders, operands = _placeholders(graph), _operands(call)
        if outer in operands:
            return placeholders[operands.index(outer)]
        with graph.inserting_after(placeholders[-1] if placeholders else None):
            inner = graph.placeholder(f"operand_{len(operands)}")
        inner.meta["example_value"] = example(outer)
        _set_operands(call, [*operands, outer])
        return inner

    def sees(self, node: fx.Node, graph: fx.Graph) -> bool:
        """Whether ``graph`` is that of a node, or of a region further in."""
        while graph is not node.graph and graph in self._calls:
            graph = self._calls[graph].graph
        return graph is node.graph

    def finish(self, dead: Collection[fx.Node]) -> fx.GraphModule:
        """Erases dead nodes, and what enters and leaves regions only for them; the copy is then ready to run.

        The users of a dead node are dead too, where what is passed through regions counts as one value.
        """
        self._prune(self.gm.graph, dead)
        self._share()
        for gm in (*self._bodies.values(), self.gm):
            for name in dict(gm.named_children()).keys() - {n.target for n in gm.graph.find_nodes(op="get_attr")}:
                gm.delete_submodule(name)
            gm.graph.lint()
            gm.recompile()
        return self.gm

    def _separate(self, gm: fx.GraphModule) -> None:
        for call in [node for node in gm.graph.nodes if _is_region(node)]:
            traced = _body(call)
            body, _ = graph_copy(traced)
            _set_body(call, body, f"{_attribute(call).target}_{len(self._calls)}")
            self._calls[body.graph], self._bodies[call], self._traced[call] = call, body, traced
            self._separate(body)

    def _expand(self, graph: fx.Graph, flat: Flat, values: dict[fx.Node, Any], storages: dict[Any, Hashable]) -> None:
        """Adds a graph, of whose placeholders the values and storages are given, and notes those of its nodes."""

        def stored(value: object) -> Hashable | None:
            key = storage_key(value)
            return key and storages.setdefault(key, (self._calls.get(graph), key))

        for node in graph.nodes:
            if node in self._bodies:
                body = self._bodies[node].graph
                inner = dict(zip(_placeholders(body), fx.map_arg(_operands(node), values.__getitem__), strict=True))
                entered = {storage_key(example(p)): storage(v) for p, v in inner.items() if isinstance(v, fx.Node)}
                left = zip(map(example, _outputs(body)), example(node), strict=True)
                self._expand(body, flat, inner, {storage_key(v): stored(w) for v, w in left} | entered)
                values[node] = fx.map_arg(_outputs(body), inner.__getitem__)
            elif self._is_item(node):
                values[node] = values[node.args[0]][node.args[1]]
            elif node not in values and not self._is_frame(node):
                copy = values[node] = flat.graph.node_copy(node, values.__getitem__)
                copy.meta["storage"] = stored(example(node))
                flat.origin[copy] = node
                if node.op == "placeholder":
                    copy_source(copy, node)

    def _prune(self, graph: fx.Graph, dead: Collection[fx.Node]) -> None:
        for node in reversed(list(graph.nodes)):
            idle = node in dead or node.op == "get_attr" or self._is_item(node)
            if node in self._bodies:
                self._narrow(node, dead)
                idle = not any(n.op.startswith("call") for n in self._bodies[node].graph.nodes)
            if idle and not node.users:
                graph.erase_node(node)
                self._bodies.pop(node, None)

    def _narrow(self, call: fx.Node, dead: Collection[fx.Node]) -> None:
        """Drops the outputs of a region that nothing uses and then the operands that it no longer needs."""
        body = self._bodies[call].graph
        if all(self._is_item(user) for user in call.users):
            used = sorted({cast(int, user.args[1]) for user in call.users})
            body.output_node().args = (tuple(_outputs(body)[i] for i in used),)
            call.meta["example_value"] = tuple(example(call)[i] for i in used)
            for user in list(call.users):
                user.args = (call, used.index(cast(int, user.args[1])))
        self._prune(body, dead)
        pairs = list(zip(_placeholders(body), _operands(call), strict=True))
        _set_operands(call, [operand for placeholder, operand in pairs if placeholder.users])
        for placeholder, _ in pairs:
            if not placeholder.users:
                body.erase_node(placeholder)

    def _share(self) -> None:
        """Gives calls that were traced with one body one again if theirs have stayed alike."""
        alike: dict[Any, fx.Node] = {}
        for call in reversed(self._bodies):
            body = self._bodies[call].graph
            examples = [_layout(example(placeholder)) for placeholder in _placeholders(body)]
            first = alike.setdefault((self._traced[call], str(body), *examples), call)
            if first is not call:
                self._bodies[call] = self._bodies[first]
                _set_body(call, self._bodies[first], str(_attribute(first).target))

    def _is_item(self, node: fx.Node) -> bool:
        """Whether a node takes one output of a region."""
        return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0] in self._bodies

    def _is_frame(self, node: fx.Node) -> bool:
        """Whether a node only names the body of a region or ends it."""
        if node.op == "output":
            return node.graph in self._calls
        return node.op == "get_attr" and node.users.keys() <= self._bodies.keys()


def _is_region(call: fx.Node) -> bool:
    """Whether a node calls a region in the way Dynamo writes it; all else stays what it is."""
    if region_operands(call.target) is None or len(_attribute(call).users) > 1:
        return False
    body, value = _body(call).graph, example(call)
    layout = len(_placeholders(body)), len(_outputs(body))
    return isinstance(value, tuple) and layout == (len(_operands(call)), len(value))


def _attribute(call: fx.Node) -> fx.Node:
    """The node that names the body of a region."""
    return cast(fx.Node, call.args[0])


def _body(call: fx.Node) -> fx.GraphModule:
    return cast(fx.GraphModule, getattr(call.graph.owning_module, str(_attribute(call).target)))


def _set_body(call: fx.Node, body: fx.GraphModule, name: str) -> None:
    """Makes a region run a body, of which calls by one name are compiled once."""
    cast(fx.GraphModule, call.graph.owning_module).add_submodule(name, body)
    _attribute(call).target = name
    call.args = (call.args[0], *[name] * (_start(call) - 1), *_operands(call))


def _operands(call: fx.Node) -> tuple[Any, ...]:
    return call.args[_start(call) :]


def _set_operands(call: fx.Node, operands: list[Any]) -> None:
    call.args = (*call.args[: _start(call)], *operands)


def _start(call: fx.Node) -> int:
    return cast(int, region_operands(call.target))


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _outputs(body: fx.Graph) -> Any:
    return body.output_node().args[0]


def _layout(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {value.device} {value.shape} {value.stride()} {value.requires_grad}"
