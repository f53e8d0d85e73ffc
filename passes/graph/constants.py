"""The part of a traced graph that depends on weights alone, and its evaluation on the live ones."""

import functools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from marlin_w4a16.passes.graph.nodes import closure, example, storage, value_of
from marlin_w4a16.passes.graph.purity import is_pure, note_reshaped, written_by
from marlin_w4a16.passes.graph.state import note_state
from marlin_w4a16.passes.graph.torch_private import is_weight_like, storage_key


@dataclass(frozen=True)
class Constants:
    """The constant part of a graph.

    Attributes:
        leaves: placeholders that hold weights.
        nodes: what is computed from leaves and literals alone, in-place writes included.
    """

    leaves: frozenset[fx.Node]
    nodes: frozenset[fx.Node]

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.nodes or node in self.leaves

    @functools.cached_property
    def writes(self) -> dict[Hashable, list[fx.Node]]:
        """The in-place writes among the nodes, by the storage they write to."""
        writes: dict[Hashable, list[fx.Node]] = {}
        for node in self.nodes:
            for target in written_by(node):
                writes.setdefault(storage(target), []).append(node)
        writes.pop(None, None)
        return writes


def find_constants(graph: fx.Graph) -> Constants:
    """Finds the maximal constant part.

    What it computes is known to depend on its inputs alone. A tensor that something else writes to, or may write to,
    and every view of it, is not constant; nor is a weight that the graph itself writes to.
    """
    leaves = {n for n in graph.nodes if n.op == "placeholder" and is_weight_like(n) and isinstance(example(n), Tensor)}
    weights = {storage(n) for n in leaves}
    unknown = note_state(graph)
    note_reshaped(graph)
    computed = [n for n in graph.nodes if n.op in ("call_function", "call_method") and n not in unknown and is_pure(n)]
    targets = {n: storages(found) for n in graph.nodes if (found := written_by(n))}
    written: set[Hashable] = set()
    while True:
        nodes: set[fx.Node] = set()
        before = len(written)
        for node in computed:
            if _is_constant(node, leaves, nodes, written):
                nodes.add(node)
        for node, held in targets.items():
            written |= held & weights if node in nodes else held
        leaves = {n for n in leaves if storage(n) not in written}
        if len(written) == before:
            return Constants(frozenset(leaves), frozenset(nodes))


def storages(nodes: Iterable[fx.Node]) -> set[Hashable]:
    """Those of some nodes; a sequence has those of its tensors."""
    single = {storage(node) for node in nodes if isinstance(example(node), Tensor)}
    many = tree_leaves([example(node) for node in nodes if not isinstance(example(node), Tensor)])
    return single | {storage_key(part) for part in many if isinstance(part, Tensor)}


def needed_by(roots: Iterable[fx.Node], constants: Constants, user: fx.Node | None = None) -> set[fx.Node]:
    """Every node that ``roots`` need, the in-place writes to what they read included: all, or those before ``user``."""

    met: set[Hashable] = set()

    def reads(node: fx.Node) -> list[fx.Node]:
        key = storage(node)
        writes = () if key in met else constants.writes.get(key, ())
        met.add(key)
        return [*node.all_input_nodes, *(write for write in writes if user is None or write < user)]

    return closure(roots, reads)


def slice_of(value: fx.Node, user: fx.Node, constants: Constants) -> list[fx.Node]:
    """What makes a constant value what ``user`` reads, in graph order: leaves, operations and in-place writes."""
    return sorted(needed_by([value], constants, user))


def value_of_constant(node: fx.Node, constants: Constants, live: Mapping[fx.Node, Any]) -> Any:
    """The value of a constant once all in-place writes are done, from the values of the leaves."""
    return value_of(node, sorted(needed_by([node], constants)), live)


def _is_constant(node: fx.Node, leaves: set[fx.Node], nodes: set[fx.Node], written: set[Hashable]) -> bool:
    """Whether a node that is known to depend on its inputs alone is constant."""
    inputs = node.all_input_nodes
    if not all(n in leaves or n in nodes for n in inputs):
        return False
    value, targets = example(node), written_by(node)
    if any(storage(target) is None for target in targets):  # a write that nothing that reads it would show
        return False
    if isinstance(value, Tensor):
        return storage(node) not in written
    return bool(targets) or (value is not None and bool(inputs))
