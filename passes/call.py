"""What a compiled graph is called through: it swaps the packed copies of the live weights in."""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.rewrite import Rewritten
from marlin_w4a16.passes.torch_private import versions_of

log = logging.getLogger("marlin_w4a16")

_State = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The state of all leaves at one call and the packed tensors that belong to it, or why there are none."""

    state: _State
    packed: list[Tensor] | Rejected
    leaves: list[weakref.ref[Tensor]]


class LiveCall:
    """A compiled graph that runs with the weights it is called with.

    Each binding looks its own leaves up; as long as no leaf of the whole graph has changed since the last call, that is
    one comparison of identities, addresses and versions.

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
        self._positions = sorted({i for bound in rewritten.bound for i in bound.leaves})
        self._last: _Snapshot | None = None
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        leaves = [args[i] for i in self._positions]
        state = _state(leaves)
        last = self._last
        if last is None or last.state != state:
            refs = [weakref.ref(leaf, self._forget()) for leaf in leaves]
            last = self._last = _Snapshot(state, self._look_up(args), refs)
        if isinstance(last.packed, Rejected):
            return self._run_as_traced(last.packed, args)
        return self._compiled(*[args[i] for i in self._kept], *last.packed)

    def _look_up(self, args: Sequence[Any]) -> list[Tensor] | Rejected:
        tensors = []
        for bound in self._bound:
            packed = bound.binding.packed([args[i] for i in bound.leaves])
            if isinstance(packed, Rejected):
                name = bound.binding.name
                return Rejected(f"{name}: {packed.reason.removeprefix(f'{name}: ')}")
            tensors += [packed.words, packed.scales, packed.multiplier]
        return tensors

    def _forget(self) -> Callable[[object], None]:
        """Drops the snapshot when a leaf dies: its identity and address may be given to another tensor."""
        owner = weakref.ref(self)

        def forget(_: object) -> None:
            call = owner()
            if call is not None:
                call._last = None

        return forget

    def _run_as_traced(self, why: Rejected, args: tuple[Any, ...]) -> Any:
        if not self._warned:
            self._warned = True
            log.warning("a weight changed and is no longer FP4 as compiled, so this graph runs eagerly: %s", why.reason)
        return self._traced(*args)


def _state(leaves: Sequence[Tensor]) -> _State:
    return list(map(id, leaves)), [leaf.data_ptr() for leaf in leaves], versions_of(leaves)
