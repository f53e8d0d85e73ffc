"""What a compiled graph is called through: it swaps the packed copies of the live weights in."""

import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from marlin_w4a16.passes.moment import Moment, state_of
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.rewrite import Rewritten

log = logging.getLogger("marlin_w4a16")


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """All leaves at one call and the packed tensors that belong to them, or why there are none."""

    leaves: Moment
    packed: list[Tensor] | Rejected


class LiveCall:
    """A compiled graph that runs with the weights it is called with.

    Each binding looks its own leaves up; while no leaf of the whole graph has changed since the last call with an
    instance of the model, that is one comparison of identities, addresses and versions.

    Args:
        compiled: the compiled form of ``rewritten.graph``.
        traced: the original graph, run eagerly for weights that no longer fit; nothing is compiled at call time.
        rewritten: what the pass made of it.
    """

    def __init__(self, compiled: Callable[..., Any], traced: Callable[..., Any], rewritten: Rewritten) -> None:
        self._compiled = compiled
        self._traced = traced
        self._kept = rewritten.kept
        self._bound = rewritten.bound
        leaves = {i for bound in rewritten.bound for i in bound.leaves}
        self._wrappers = rewritten.wrappers
        self._plain = _getter(sorted(leaves - self._wrappers.keys()))
        self._codes = rewritten.bound[0].codes  # tells instances of the model apart
        self._snapshots: dict[int, _Snapshot] = {}
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        leaves = self._plain(args)
        if self._wrappers:
            parts = [getattr(args[i], name) for i, names in self._wrappers.items() for name in names]
            leaves = [*leaves, *parts, *[args[i] for i in self._wrappers]]  # as `watched` orders them
        state = state_of(leaves)
        instance = id(args[self._codes])
        snapshot = self._snapshots.get(instance)
        if snapshot is None or not snapshot.leaves.holds(leaves, state):
            packed = self._look_up(args)
            snapshot = self._snapshots[instance] = _Snapshot(Moment(leaves, state, self._forget(instance)), packed)
        if isinstance(snapshot.packed, Rejected):
            return self._run_as_traced(snapshot.packed, args)
        return self._compiled(*[args[i] for i in self._kept], *snapshot.packed)

    def _look_up(self, args: Sequence[Any]) -> list[Tensor] | Rejected:
        tensors = []
        for bound in self._bound:
            found = bound.binding.packed([args[i] for i in bound.leaves])
            if isinstance(found, Rejected):
                name = bound.binding.name
                return Rejected(f"{name}: {found.reason.removeprefix(f'{name}: ')}")
            tensors += [found.words, found.scales, found.multiplier]
        return tensors

    def _forget(self, instance: int) -> Callable[[object], None]:
        """Lets the packed tensors go when a leaf dies."""
        call = weakref.ref(self)

        def forget(_: object) -> None:
            owner = call()
            if owner is not None:
                owner._snapshots.pop(instance, None)

        return forget

    def _run_as_traced(self, why: Rejected, args: tuple[Any, ...]) -> Any:
        if not self._warned:
            self._warned = True
            log.warning("a weight changed and is no longer FP4 as compiled, so this graph runs eagerly: %s", why.reason)
        return self._traced(*args)


def _getter(positions: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Gets these positions; `operator.itemgetter` gives no sequence for one, and wants some."""
    if len(positions) < 2:
        return lambda args: [args[i] for i in positions]
    return operator.itemgetter(*positions)
