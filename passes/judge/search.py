"""Judges a weight by its value: is it the decode of FP4 codes and scales that it was made from?

Whatever operations a model uses, the value they compute must be what a hypothesis predicts, element by element: where
codes, scales and a factor stand (`recipe`), and what is rounded on the way (`roundings`). Hypotheses are tried on a few
rows; one that survives is held against the whole weight.
"""

import enum
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import GROUP_SIZES, FP4Weight, format_name
from marlin_w4a16.passes.graph.names import dtype_name
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.judge import tensors
from marlin_w4a16.passes.judge.decode import Decode, Window
from marlin_w4a16.passes.judge.places import codes_in, is_bytes, scales_in
from marlin_w4a16.passes.judge.recipe import Factor, FromSources, FromValue, Joined, Leaves, OfType, Recipe, Source
from marlin_w4a16.passes.judge.roundings import Difference, Roundings, first_difference, roundings_of
from marlin_w4a16.passes.judge.samples import NEAR, Samples, fits_some_scales
from marlin_w4a16.passes.judge.verdict import Found, TooFar, judged, settled
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.settings import Rules

_SAMPLE_ROWS = 8
# Hypotheses that are held against a few rows: known forms take seven hundred at most. After many, only codes that fit
# with whatever scales are looked at; after the most, the search ends.
_MANY_TRIALS, _MOST_TRIALS = 1024, 8192


def recognise(decode: Decode, leaves: Leaves, name: str, rules: Rules) -> Found | Rejected:
    """Finds how the live leaves of a weight hold it; ``name`` is what messages call it."""
    return _Search(decode, leaves, name, rules).run(decode.weight(leaves))


def may_be_fp4(decode: Decode, rules: Rules) -> bool:
    """Whether leaves could hold a weight: cheap, before anything is evaluated."""
    leaves = [example(leaf) for leaf in decode.leaves]
    typed = [leaf for leaf in leaves if tensors.is_typed(leaf)]
    if typed or (rules.recover and not any(map(is_bytes, leaves))):
        return all(map(tensors.is_fp4, typed))
    sizes = {decode.rows * decode.matrices.k} | {value.numel() for _, value in decode.tensors}
    return any(is_bytes(value) and value.numel() * 2 in sizes for _, value in decode.tensors)


def _sampled(value: Tensor) -> list[int]:
    """A few of the rows that are not zero."""
    used = value.count_nonzero(1).nonzero()[:, 0]
    return used[torch.linspace(0, len(used) - 1, min(_SAMPLE_ROWS, len(used))).long()].tolist()


class _Near(enum.IntEnum):
    """How far a hypothesis came before it was wrong."""

    ELEMENTS = 0  # some elements of a few rows have another ratio to their codes times scales
    FACTOR = 1  # the rows are right but for a factor that is nowhere to be found
    ROWS = 2  # with a factor that was found, an element of the rows is not bit for bit right
    WEIGHT = 3  # the rows are right, the whole weight is not


class _Search:
    """The search for the recipe of one weight."""

    def __init__(self, decode: Decode, leaves: Leaves, name: str, rules: Rules) -> None:
        self.decode, self.leaves, self.name, self.rules = decode, leaves, name, rules
        self.agreement = (_Near.ELEMENTS, 0.0)
        self.nearest = Rejected("no hypothesis fits")
        self.trials, self.looked_at_scales = 0, False
        self.trials_of_the_whole = 16 + len(decode.nodes) // 16  # what holding all of it against a hypothesis counts as
        self.wrong: set[FromSources] = set()  # in the few rows
        self.fit: dict[tuple[Source, Window], bool] = {}

    def run(self, value: Tensor) -> Found | Rejected:
        """Judges the traced weight: exact hypotheses first, then those that round on the way."""
        typed = [i for i, leaf in enumerate(self.leaves) if tensors.is_typed(leaf)]
        if typed:
            return self._of_type(typed[0], value)
        if not any(map(is_bytes, self.leaves)) and self.rules.recover:
            return settled(self._judge(FromValue(), Roundings(), value))
        if not bool(value.isfinite().all()):
            return self._not_finite(value)
        self.samples = Samples(self.decode, self.leaves, _sampled(value))
        self.seen = value[self.samples.rows]
        found = self._from_sources(value, exact=True)
        if isinstance(found, Found):
            return found
        joined = self._joined(value)
        if isinstance(joined, Found):
            return joined
        rounded = self._from_sources(value, exact=False)
        return rounded if isinstance(rounded, Found) else joined or rounded

    def _of_type(self, leaf: int, value: Tensor) -> Found | Rejected:
        tensor = self.leaves[leaf]
        quantised = tensors.activations(tensor)
        if quantised is not None and not self.rules.drop_activations:
            return Rejected(
                f"its linear quantises the input too ({quantised}), inside the tensor's class: "
                "options={'activation_quant': 'drop'} leaves that out"
            )
        weight = tensors.read(tensor, self.name)
        if isinstance(weight, Rejected):
            return weight
        return settled(self._judge(OfType(leaf, weight.kind, weight.group), Roundings(), value))

    def _judge(self, recipe: Recipe, roundings: Roundings, value: Tensor) -> Found | Rejected | TooFar:
        return judged(recipe, roundings, self.decode, self.leaves, self.name, self.rules, value)

    def _not_finite(self, value: Tensor) -> Rejected:
        """Some scale that is NaN is the likely reason."""
        tried: dict[tuple[Source, Window, int], FromSources] = {}
        for codes, window in codes_in(self.decode):
            for scales, group in scales_in(self.decode, window, codes.node):
                if scales.coding.endswith("bytes") and codes.coding.endswith("nibble first"):
                    tried.setdefault((scales, window, group), FromSources(codes, scales, Factor(), window, group))
        for recipe in islice(tried.values(), _MOST_TRIALS // self.trials_of_the_whole):
            try:
                recipe.read(self.decode, self.leaves, self.name)
            except ValueError as error:
                return Rejected(str(error).removeprefix(f"{self.name}: "))
        return Rejected(f"the traced weight holds NaN or Inf in {dtype_name(value.dtype)}")

    def _from_sources(self, value: Tensor, exact: bool) -> Found | Rejected:
        """The first hypothesis that gives the rows that are looked at, and then the whole value."""
        for base, part in self._sampled_weights():
            for recipe, roundings in self._fitting(part, self.seen, base, exact):
                found = self._judge(recipe, roundings, value)
                if isinstance(found, TooFar):
                    return found.refusal
                if isinstance(found, Found):
                    return found
                self._see(found, _Near.WEIGHT)
                self.trials += self.trials_of_the_whole
            if self.trials > _MOST_TRIALS:
                return Rejected(f"too many of its tensors may be codes, scales or factors: {self.nearest.reason}")
        return self.nearest if self.trials else Rejected(self._sizes())

    def _sampled_weights(self) -> Iterator[tuple[FromSources, FP4Weight]]:
        """Where codes and scales may stand, and what they are in the rows that are looked at."""
        for codes, window in codes_in(self.decode):
            few = self.samples.codes(codes, window)
            if few is None or not self._may_be_codes((codes, window), few):
                continue
            for scales, group in scales_in(self.decode, window, codes.node):
                self.looked_at_scales = True
                base = FromSources(codes, scales, Factor(), window, group)
                read = self.samples.scales(scales, window, group)
                if read is not None and base not in self.wrong:
                    own = torch.ones(len(few), device=few.device) if read[1] is None else read[1]
                    yield base, FP4Weight.unchecked(few, read[0], own, base.kind, group)

    def _may_be_codes(self, codes: tuple[Source, Window], few: Tensor) -> bool:
        """Whether codes are worth looking at: after many trials, those alone that are it with whatever scales."""
        if self.trials <= _MANY_TRIALS:
            return True
        if codes not in self.fit:
            self.fit[codes] = fits_some_scales(few, self.seen)
        return self.fit[codes]

    def _fitting(
        self, part: FP4Weight, sample: Tensor, base: FromSources, exact: bool
    ) -> Iterator[tuple[FromSources, Roundings]]:
        """The factors and roundings with which some rows come out right."""
        rows, self.trials = self.samples.rows, self.trials + 1
        unscaled, found = part.unscaled(torch.float64) * part.multiplier.double()[:, None], sample.double()
        ratio = torch.where((unscaled != 0) & (found != 0), found / unscaled, torch.nan)
        middle = ratio.nanmedian(1, keepdim=True).values
        near = torch.where(unscaled == 0, found == 0, (ratio / middle - 1).abs() < NEAR)
        what = f"{format_name(part.kind, part.group)}, {base.codes.coding}"
        if not bool(near.all()):
            self.wrong.add(base)
            row, column = (~near).nonzero()[0].tolist()
            expected = float((unscaled * middle.nan_to_num(1.0))[row, column])
            first = Difference(rows[row], column, expected, float(found[row, column]))
            self._see(Rejected(f"it is not {what}", str(first)), _Near.ELEMENTS, float(near.double().mean()))
            return
        factors = list(self._factors(base.window, middle[:, 0]))
        if not factors:
            why = f"{what} but for a factor that no tensor and no number of the graph gives"
            self._see(Rejected(why, f"{float(middle[0, 0]):.7g}"), _Near.FACTOR)
        for factor, values in factors:
            self.trials += 1
            own = values * part.multiplier
            scaled = (values.reciprocal() if factor.divides else values) * part.multiplier
            few = part.derived(part.codes, part.scales, scaled)
            ways = roundings_of(sample.dtype, self._computed_in(sample.dtype), factor.divides)
            for roundings in (way for way in ways if way.exact == exact):
                difference = first_difference(roundings, few, own, sample)
                if difference is None:
                    yield FromSources(base.codes, base.scales, factor, base.window, base.group), roundings
                elif roundings.exact:
                    at = Difference(rows[difference.row], difference.column, difference.expected, difference.found)
                    self._see(Rejected(f"it is not {what}", str(at)), _Near.ROWS)

    def _joined(self, value: Tensor) -> Found | Rejected | None:
        axis, parts = self.decode.parts
        start, found = 0, []
        for part in parts:
            size = part.matrices.k if axis else part.rows
            leaves = [self.leaves[i] for i in self.decode.places(part.leaves)]
            of_part = _Search(part, leaves, self.name, self.rules).run(value.narrow(axis, start, size))
            if isinstance(of_part, Rejected):
                which = f"its {'columns' if axis else 'rows'} from {start} to {start + size - 1}"
                return Rejected(f"{which}: {of_part.why}", of_part.detail)
            found.append(of_part)
            start += size
        if not found:
            return None
        if len({(f.format, f.roundings) for f in found}) > 1:
            return Rejected(f"parts of several formats: {', '.join(sorted({f.format for f in found}))}")
        return settled(self._judge(Joined(tuple(f.recipe for f in found), axis), found[0].roundings, value))

    def _factors(self, window: Window, wanted: Tensor) -> Iterator[tuple[Factor, Tensor]]:
        """The tensors and numbers that are near the factor that rows want, with their values for these rows."""
        factors, values = self.samples.factors(window, wanted.device)
        near = torch.stack([((way / wanted - 1).abs() < NEAR).all(1) for way in (values, values.reciprocal())], 1)
        for place, divides in near.nonzero().tolist():
            factor = factors[place]
            if not (divides and factor == Factor()):
                yield Factor(factor.node, factor.number, bool(divides)), values[place]

    def _computed_in(self, dtype: torch.dtype) -> set[torch.dtype]:
        halves = {torch.float16, torch.bfloat16}
        return {dtype} if dtype in halves else halves & {value.dtype for _, value in self.decode.tensors}

    def _see(self, refusal: Rejected, near: _Near, share: float = 0.0) -> None:
        """Remembers the hypothesis that came nearest; ``share`` of the elements were right."""
        if (near, share) > self.agreement:
            self.agreement, self.nearest = (near, share), refusal

    def _sizes(self) -> str:
        rows, k = self.decode.rows, self.decode.matrices.k
        if self.looked_at_scales:
            return "its block scales are not E4M3 or E8M0 numbers times one factor a row"
        for _, value in self.decode.tensors:
            group = rows * k // max(1, value.numel())
            if value.numel() * group == rows * k and 4 <= group <= 1024 and group not in GROUP_SIZES and k % group == 0:
                return f"its scales would belong to groups of {group}, expected {' or '.join(map(str, GROUP_SIZES))}"
        return f"no tensor has the size of block scales of [{rows}, {k}] in groups of 16 or 32 along its columns"
