"""The part of a traced graph that depends on weights alone, and its evaluation on the live ones."""

import functools
import operator
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.passes.graph.nodes import closure, example, storage, value_of
from marlin_w4a16.passes.graph.torch_private import is_higher_order, is_weight_like, may_write

_RANDOM = frozenset(
    {"rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "normal", "bernoulli",
     "multinomial", "poisson", "binomial", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
     "feature_alpha_dropout", "rrelu", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "cauchy_",
     "geometric_", "log_normal_"}
)  # fmt: skip
_IN_PLACE_OPERATORS = frozenset(
    {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior,
     operator.ixor, operator.ilshift, operator.irshift, operator.ifloordiv, operator.imod, operator.ipow}
)  # fmt: skip
_IN_PLACE_METHODS = frozenset(f"__{operator_.__name__}__" for operator_ in _IN_PLACE_OPERATORS)


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

    A tensor that something else writes to, and every view of it, is not constant; nor is a weight that the graph
    itself writes to.
    """
    leaves = {n for n in graph.nodes if n.op == "placeholder" and is_weight_like(n) and isinstance(example(n), Tensor)}
    weights = {storage(n) for n in leaves}
    written: set[Hashable] = set()
    while True:
        nodes: set[fx.Node] = set()
        before = len(written)
        for node in graph.nodes:
            if _is_constant(node, leaves, nodes, written):
                nodes.add(node)
            targets = {storage(target) for target in written_by(node)}
            written |= targets & weights if node in nodes else targets
        leaves = {n for n in leaves if storage(n) not in written}
        if len(written) == before:
            return Constants(frozenset(leaves), frozenset(nodes))


def needed_by(roots: Iterable[fx.Node], constants: Constants, user: fx.Node | None = None) -> set[fx.Node]:
    """Every node that ``roots`` need, the in-place writes to what they read included: all, or those before ``user``."""

    def reads(node: fx.Node) -> list[fx.Node]:
        writes = constants.writes.get(storage(node), ())
        return [*node.all_input_nodes, *(write for write in writes if user is None or write < user)]

    return closure(roots, reads)


def slice_of(value: fx.Node, user: fx.Node, constants: Constants) -> list[fx.Node]:
    """What makes a constant value what ``user`` reads, in graph order: leaves, operations and in-place writes."""
    return sorted(needed_by([value], constants, user))


def value_of_constant(node: fx.Node, constants: Constants, live: Mapping[fx.Node, Any]) -> Any:
    """The value of a constant once all in-place writes are done, from the values of the leaves."""
    return value_of(node, sorted(needed_by([node], constants)), live)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node writes to in place, or may write to."""
    if may_write(node.target):
        return node.all_input_nodes
    written: list[fx.Node] = []
    first = node.args[:1] or node.kwargs.get("input")
    fx.map_arg((node.kwargs.get("out"), first if _in_place(node) else None), written.append)
    return written


def _in_place(node: fx.Node) -> bool:
    name, module = _name(node), getattr(node.target, "__module__", "")
    if name in _IN_PLACE_METHODS or node.target in _IN_PLACE_OPERATORS or node.kwargs.get("inplace"):
        return True
    if module == "torch.nn.functional" and True in node.args[1:]:  # inplace may stand without its name
        return True
    return name.endswith("_") and not name.endswith("__") and module != "_operator"


def _is_constant(node: fx.Node, leaves: set[fx.Node], nodes: set[fx.Node], written: set[Hashable]) -> bool:
    if node.op not in ("call_function", "call_method") or is_higher_order(node.target) or _name(node) in _RANDOM:
        return False
    inputs = node.all_input_nodes
    if not all(n in leaves or n in nodes for n in inputs):
        return False
    if written_by(node):
        return True
    value = example(node)
    if value is None or storage(node) in written:
        return False
    return isinstance(value, Tensor) or bool(inputs)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
