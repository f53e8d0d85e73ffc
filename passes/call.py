"""What a compiled graph is called through: it swaps the packed copies of the live weights in."""

import logging
from collections.abc import Callable
from typing import Any

from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.rewrite import Rewritten

log = logging.getLogger("marlin_w4a16")


class LiveCall:
    """A compiled graph that runs with the weights it is called with.

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
        self._warned = False

    def __call__(self, *args: Any) -> Any:
        inputs = [args[i] for i in self._kept]
        for bound in self._bound:
            packed = bound.binding.packed([args[i] for i in bound.leaves])
            if isinstance(packed, Rejected):
                return self._run_as_traced(packed, args)
            inputs += (packed.words, packed.scales, packed.multiplier)
        return self._compiled(*inputs)

    def _run_as_traced(self, why: Rejected, args: tuple[Any, ...]) -> Any:
        if not self._warned:
            self._warned = True
            log.warning("a weight changed and is no longer FP4 as compiled, so this graph runs eagerly: %s", why.reason)
        return self._traced(*args)
