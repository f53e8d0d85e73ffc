"""What a compiled graph is called through: it swaps the packed copies of the live weights in."""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.passes.graph.torch_private import GUARDS_LAYOUTS, layout_check
from marlin_w4a16.passes.live.binding import Binding
from marlin_w4a16.passes.live.snapshot import Snapshot, callback, mark, state_of
from marlin_w4a16.passes.outcome import Rejected, Row

log = logging.getLogger("marlin_w4a16")


@dataclass(frozen=True, slots=True)
class Bound:
    """A binding and where its leaves, and among them its codes, stand among the inputs of the traced graph."""

    binding: Binding
    leaves: tuple[int, ...]
    codes_leaf: int


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What the pass made of a graph.

    Attributes:
        graph: the rewritten graph; it takes the inputs ``kept`` of the traced one, then three of each packed weight.
        inputs: example inputs of it: the live ones that are kept, and fake ones for packed tensors.
        kept: positions of the traced inputs that are still used.
        bound: the weights to look up at each call.
        rows: the report.
        wrappers: positions of leaves that are wrapper subclasses, and the names of the tensors that hold their data.
        rounds: something was left because it rounds on the way; see `outcome.Rejected`.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    kept: tuple[int, ...]
    bound: tuple[Bound, ...]
    rows: tuple[Row, ...]
    wrappers: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    rounds: bool = False


@dataclass(frozen=True, slots=True)
class _Instance:
    """All leaves at one call and the packed tensors that belong to them, or why there are none."""

    leaves: Snapshot
    same_layouts: Callable[[Sequence[Tensor]], bool]
    packed: list[Tensor] | Rejected


class LiveCall:
    """A compiled graph that runs with the weights it is called with.

    Each binding looks its own leaves up; while no leaf of the whole graph has changed since the last call with an
    instance of the model, that is one comparison of identities, marks, addresses and versions.

    Args:
        compiled: the compiled form of ``rewritten.graph``.
        traced: the original graph, run eagerly for weights that no longer fit; nothing is compiled at call time.
        rewritten: what the pass made of it.
    """

    def __init__(self, compiled: Callable[..., Any], traced: Callable[..., Any], rewritten: Rewritten) -> None:
        self._compiled, self._traced = compiled, traced
        self._kept, self._bound, self._wrappers = rewritten.kept, rewritten.bound, rewritten.wrappers
        leaves = {i for bound in rewritten.bound for i in bound.leaves}
        self._plain = _getter(sorted(leaves - self._wrappers.keys()))
        self._codes_leaf = rewritten.bound[0].codes_leaf  # tells instances of the model apart
        self._instances: dict[int, _Instance] = {}
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        leaves = self._plain(args)
        if self._wrappers:
            parts = [getattr(args[i], name) for i, names in self._wrappers.items() for name in names]
            leaves = [*leaves, *parts, *[args[i] for i in self._wrappers]]  # as `watched` orders them
        state = state_of(leaves)
        held = self._instances.get(id(args[self._codes_leaf]))
        if held is None or not held.leaves.holds(state) or not held.same_layouts(leaves):
            held = self._look_all_up(args, leaves)
        if isinstance(held.packed, Rejected):
            return self._run_as_traced(held.packed, args)
        return self._compiled(*[args[i] for i in self._kept], *held.packed)

    def _look_all_up(self, args: Sequence[Any], leaves: Sequence[Tensor]) -> _Instance:
        """Looks each weight up, twice if one shows that another, over the same memory, was written to."""
        instance = id(args[self._codes_leaf])
        mark(leaves)
        same_layouts, before = _same_layouts(leaves), self._instances.get(instance)
        for _ in range(2):
            state = state_of(leaves)
            snapshot = Snapshot(leaves, state, self._forget(instance))
            held = self._instances[instance] = _Instance(snapshot, same_layouts, self._look_up(args, snapshot))
            if snapshot.holds(state):
                break
        if isinstance(held.packed, Rejected) and (before is None or not before.leaves.held(state)):
            held.leaves.end_others()  # of the weights that were not looked up
        return held

    def _look_up(self, args: Sequence[Any], user: Snapshot) -> list[Tensor] | Rejected:
        tensors = []
        for bound in self._bound:
            found = bound.binding.packed([args[i] for i in bound.leaves], user)
            if isinstance(found, Rejected):
                name = bound.binding.name
                return Rejected(f"{name}: {found.reason.removeprefix(f'{name}: ')}")
            tensors += [found.words, found.scales, found.multiplier]
        return tensors

    def _forget(self, instance: int) -> Callable[[object], None]:
        """Lets the packed tensors go when a leaf dies."""
        return callback(self, lambda call: call._instances.pop(instance, None))

    def _run_as_traced(self, why: Rejected, args: tuple[Any, ...]) -> Any:
        if not self._warned:
            self._warned = True
            log.warning("a weight changed and is no longer FP4 as compiled, so this graph runs eagerly: %s", why.reason)
        return self._traced(*args)


def _same_layouts(leaves: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """Whether tensors are laid out as these are, where Dynamo's guards do not compare that already."""
    if GUARDS_LAYOUTS:
        return lambda _: True
    check = layout_check(leaves)
    return lambda tensors: check(*tensors)


def _getter(positions: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Gets these positions; `operator.itemgetter` gives no sequence for one, and wants some."""
    if len(positions) < 2:
        return lambda args: [args[i] for i in positions]
    return operator.itemgetter(*positions)
