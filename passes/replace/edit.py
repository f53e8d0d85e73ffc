"""A traced graph while it is edited: what was put in, what that stands for, and what nothing needs any more."""

from collections.abc import Iterable
from typing import Any

from torch import fx

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.graph.constants import needed_by
from marlin_w4a16.passes.graph.torch_private import add_static_input, part_names
from marlin_w4a16.passes.graph.traced import Traced
from marlin_w4a16.passes.judge.weights import Weight
from marlin_w4a16.passes.live.binding import Binding
from marlin_w4a16.passes.live.call import Bound, Rewritten
from marlin_w4a16.passes.outcome import Row


class Edit:
    """Edits the copy of a traced graph; nodes are those of its flat graph, unless said otherwise."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self._placeholders = list(traced.regions.gm.graph.find_nodes(op="placeholder"))
        self._bound: list[Bound] = []
        self._added: list[tuple[fx.Node, Any]] = []
        self._gone: set[fx.Node] = set()
        self._read: list[fx.Node] = []

    def here(self, node: fx.Node) -> fx.Node:
        """The node of the edited graph that a node stands for."""
        return self.traced.flat.origin[node]

    def reach(self, node: fx.Node, graph: fx.Graph) -> fx.Node:
        """A node as it is seen in a graph of the edited ones."""
        return self.traced.regions.reach(self.here(node), graph)

    def feed(self, weight: Weight, binding: Binding, packed: PackedFP4) -> list[fx.Node]:
        """Adds the inputs that are a packed weight: its words, scales and multiplier, nodes of the edited graph."""
        leaves = tuple(self._placeholders.index(self.here(leaf)) for leaf in weight.decode.leaves)
        codes = leaves[weight.codes_leaf]
        self._bound.append(Bound(binding, leaves, codes))
        after = self._added[-1][0] if self._added else self._placeholders[-1]
        for member in ("words", "scales", "multiplier"):
            name = f"{member}_{len(self._bound)}"
            with after.graph.inserting_after(after):
                after, fake = add_static_input(after.graph, self._placeholders[codes], name, getattr(packed, member))
            self._added.append((after, fake))
        return [node for node, _ in self._added[-3:]]

    def replaced(self, nodes: Iterable[fx.Node], read: Iterable[fx.Node]) -> None:
        """Notes that ops stand for some nodes now, and what these ops read."""
        self._gone |= set(nodes)
        self._read += read

    def replaced_all(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether ops stand for all of some nodes."""
        return self._gone.issuperset(nodes)

    def finish(self, rows: Iterable[Row]) -> Rewritten:
        """The rewritten graph, without what is no longer needed."""
        traced, placeholders, graph = self.traced, self._placeholders, self.traced.regions.gm.graph
        leaves_of_all = {self.here(leaf) for leaf in traced.constants.leaves}
        result = traced.regions.finish(self._dead())
        kept = tuple(i for i, n in enumerate(placeholders) if n.users or n not in leaves_of_all)
        for i in set(range(len(placeholders))) - set(kept):
            graph.erase_node(placeholders[i])
        result.graph.lint()
        result.recompile()
        leaves = {i for each in self._bound for i in each.leaves}
        wrappers = {i: names for i in sorted(leaves) if (names := part_names(traced.inputs[i]))}
        examples = [traced.inputs[i] for i in kept] + [fake for _, fake in self._added]
        return Rewritten(result, examples, kept, tuple(self._bound), tuple(rows), wrappers)

    def _dead(self) -> set[fx.Node]:
        """The nodes of the edited graph that nothing needs any more."""
        constants = self.traced.constants
        others = (n for n in self.traced.flat.graph.nodes if n not in constants.nodes and n not in self._gone)
        roots = [n for node in others for n in node.all_input_nodes] + self._read
        needed = needed_by([n for n in roots if n in constants.nodes], constants)
        return {self.here(n) for n in (*(constants.nodes - needed), *self._gone)}
