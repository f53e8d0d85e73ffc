"""The pass: from a traced graph and its live inputs to a graph of FP4 ops, the bindings that feed it, and a report.

Weights that stand in products are found (find/), each is judged by its value (judge/), two of them with what stands
around them may be a whole mixture of experts (mixture/): that is proved, unit by unit. What was proved is replaced
(replace/) by ops on packed copies that follow the live weights (live/); then the ops alone are looked at (fuse/).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import compute_dtype
from marlin_w4a16.passes.fuse.stage import fuse
from marlin_w4a16.passes.graph.traced import Traced
from marlin_w4a16.passes.judge.ranges import out_of_range
from marlin_w4a16.passes.judge.verdict import Found, Verdict
from marlin_w4a16.passes.judge.weights import Judge, Weight
from marlin_w4a16.passes.live.binding import Copies, fit
from marlin_w4a16.passes.live.call import Rewritten
from marlin_w4a16.passes.mixture.proof import Prover
from marlin_w4a16.passes.mixture.stacks import pack_stack
from marlin_w4a16.passes.mixture.units import Unit, find_units
from marlin_w4a16.passes.outcome import Excluded, Rejected, Row
from marlin_w4a16.passes.replace.edit import Edit
from marlin_w4a16.passes.replace.report_rows import owned
from marlin_w4a16.passes.replace.whole import Alone, WholeMixture
from marlin_w4a16.passes.settings import Settings

log = logging.getLogger("marlin_w4a16")
DEFAULTS = Settings()
_NOT_GROUPED = Excluded("options={'grouped': False}")
Pack = Callable[[Weight, Found, Order | None], PackedFP4]


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings = DEFAULTS) -> Rewritten:
    """Replaces what it can prove in a graph from Dynamo, by its live inputs; the graph itself is left as it was.

    An error on the way leaves the whole graph as traced: the report then has one row, with the reason.
    """
    try:
        return _rewritten(gm, inputs, settings)
    except Exception as error:
        return Rewritten(gm, list(inputs), tuple(range(len(inputs))), (), (_failed(error),))


def survey(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings = DEFAULTS) -> tuple[Row, ...]:
    """The report of `rewrite`, without changing anything; of mixtures that are alike, one is packed for its proof."""
    try:
        return _surveyed(gm, inputs, settings)
    except Exception as error:
        return (_failed(error),)


def _failed(error: Exception) -> Row:
    log.debug("the pass failed", exc_info=error)
    why = f"the pass failed, so the whole graph is left: {type(error).__name__}: {error}"
    return Row("(the graph)", "any product", (0, 0), None, Rejected(why), 0)


def _rewritten(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> Rewritten:
    traced = Traced(gm, inputs)
    rows, edit, prove = list(owned(traced.flat.graph)), Edit(traced), _Prove(settings)
    rounds = False
    for unit in find_units(traced, settings):
        copies = Copies(settings.rules)
        for whole in prove(unit, copies.packed):
            rows += whole.replace(edit, copies, settings.verify)
            rounds |= isinstance(whole, Alone) and whole.rounds
    fuse(traced.regions.graphs)
    return replace(edit.finish(rows), rounds=rounds)


def _surveyed(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> tuple[Row, ...]:
    traced = Traced(gm, inputs)
    rows, prove = list(owned(traced.flat.graph)), _Prove(settings)
    for unit in find_units(traced, settings):
        rows += [row for whole in prove(unit, _packed) for row in whole.rows()]
    return tuple(rows)


def _packed(weight: Weight, found: Found, order: Order | None) -> PackedFP4:
    return pack_stack(found.weight, weight.decode.matrices.batch, order)


class _Prove:
    """Says what the weights of a unit are."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._judge, self._prover = settings, Judge(settings), Prover()

    def __call__(self, unit: Unit, pack: Pack) -> Sequence[Alone | WholeMixture]:
        """What is replaced or left as one: whole mixtures, or weights by themselves; ``pack`` packs what was found."""
        founds = [self._found(weight, unit) for weight in unit.weights]
        whole = self._whole(unit, founds, pack)
        if isinstance(whole, WholeMixture):
            return [whole]
        alone = []
        for weight, found in zip(unit.weights, founds, strict=True):
            left = isinstance(found, Found) and weight.routed and not self._settings.grouped
            alone.append(Alone(weight, (whole or _NOT_GROUPED) if left else found, whole))
        return alone

    def _found(self, weight: Weight, unit: Unit) -> Verdict:
        if weight.routed and not self._settings.grouped and not unit.mixtures:
            return _NOT_GROUPED
        found = self._judge(weight)
        if not isinstance(found, Found):
            return found
        dtype = compute_dtype(weight.products)
        fitted = fit(found.weight, dtype)
        if isinstance(fitted, FP4Weight):
            fitted = out_of_range(fitted, dtype, self._settings.rules.tolerance) or fitted
        return fitted if isinstance(fitted, Rejected) else replace(found, weight=fitted)

    def _whole(self, unit: Unit, founds: Sequence[Verdict], pack: Pack) -> WholeMixture | Rejected | None:
        """The mixtures of a unit, or why they are none; None if it is not about any."""
        if isinstance(unit.mixtures, Rejected):
            return unit.mixtures
        if not unit.mixtures:
            return None
        (w13, w2), (first, second) = unit.weights, founds
        if not (isinstance(first, Found) and isinstance(second, Found)):
            return Rejected("no whole mixture: its other weight is left")

        def both(order: Order | None) -> tuple[PackedFP4, PackedFP4]:
            return pack(w13, first, order), pack(w2, second, None)

        mixtures = []
        for candidates in unit.mixtures:
            proved = self._prover(candidates, both)
            if isinstance(proved, Rejected):
                return proved
            mixtures.append(proved)
        if len({proved.order for proved in mixtures}) > 1:
            return Rejected("no whole mixture: gates in several orders")
        return WholeMixture((w13, w2), (first, second), mixtures)
