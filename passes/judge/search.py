"""Judges a weight by its value: is it the decode of FP4 codes and scales that it was made from?

Whatever operations a model uses, the value they compute must be what a hypothesis predicts, element by element: where
codes, scales and a factor stand (`recipe`), and what is rounded on the way (`roundings`). Hypotheses are tried on a few
rows; one that survives is held against the whole weight.
"""

import enum
from collections.abc import Iterator

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import GROUP_SIZES, FP4Weight, format_name
from marlin_w4a16.passes.graph.names import dtype_name
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.judge import tensors
from marlin_w4a16.passes.judge.decode import Decode, Window
from marlin_w4a16.passes.judge.places import codes_in, factors_in, is_bytes, scales_in
from marlin_w4a16.passes.judge.recipe import Factor, FromSources, FromValue, Joined, Leaves, OfType, Recipe, Source
from marlin_w4a16.passes.judge.roundings import Difference, Roundings, first_difference, roundings_of
from marlin_w4a16.passes.judge.verdict import Found, TooFar, judged, settled
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.settings import Rules

_SAMPLE_ROWS = 8
# How far a traced value may be from its decode for a hypothesis to be looked at closely: three roundings to bfloat16
# stay below 2**-6, neighbouring codes and scales differ by more than 2**-4.
_NEAR = 2.0**-5


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
        self.scales: dict[tuple[Source, Window, int], tuple[Tensor, Tensor | None] | None] = {}

    def run(self, value: Tensor) -> Found | Rejected:
        """Judges the traced weight: exact hypotheses first, then those that round on the way."""
        typed = [i for i, leaf in enumerate(self.leaves) if tensors.is_typed(leaf)]
        if typed:
            return self._of_type(typed[0], value)
        if not any(map(is_bytes, self.leaves)) and self.rules.recover:
            return settled(self._judge(FromValue(), Roundings(), value))
        if not bool(value.isfinite().all()):
            return self._not_finite(value)
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
        for codes, window in codes_in(self.decode):
            for scales, group in scales_in(self.decode, window, codes.node):
                if not (scales.coding.endswith("bytes") and codes.coding.endswith("nibble first")):
                    continue
                try:
                    FromSources(codes, scales, Factor(), window, group).read(self.decode, self.leaves, self.name)
                except ValueError as error:
                    return Rejected(str(error).removeprefix(f"{self.name}: "))
        return Rejected(f"the traced weight holds NaN or Inf in {dtype_name(value.dtype)}")

    def _from_sources(self, value: Tensor, exact: bool) -> Found | Rejected:
        used = value.count_nonzero(1).nonzero()[:, 0]
        rows = used[torch.linspace(0, len(used) - 1, min(_SAMPLE_ROWS, len(used))).long()].tolist()
        sample = value[rows]
        tried = False
        for codes, window in codes_in(self.decode):
            try:
                few = codes.read_codes(self.decode, self.leaves, window, rows)
            except ValueError:
                continue
            for scales, group in scales_in(self.decode, window, codes.node):
                read = self._read_scales(scales, window, group)
                if read is None:
                    continue
                tried = True
                shown = window.rows(self.decode.rows)
                own = read[1][shown][rows] if read[1] is not None else torch.ones(len(rows), device=few.device)
                base = FromSources(codes, scales, Factor(), window, group)
                part = FP4Weight.unchecked(few, read[0][shown][rows], own, base.kind, group)
                for recipe, roundings in self._fitting(part, sample, rows, base, exact):
                    found = self._judge(recipe, roundings, value)
                    if isinstance(found, TooFar):
                        return found.refusal
                    if isinstance(found, Found):
                        return found
                    self._see(found, _Near.WEIGHT)
        return self.nearest if tried else Rejected(self._sizes())

    def _fitting(
        self, part: FP4Weight, sample: Tensor, rows: list[int], base: FromSources, exact: bool
    ) -> Iterator[tuple[FromSources, Roundings]]:
        """The factors and roundings with which some rows come out right."""
        unscaled, found = part.unscaled(torch.float64) * part.multiplier.double()[:, None], sample.double()
        ratio = torch.where((unscaled != 0) & (found != 0), found / unscaled, torch.nan)
        middle = ratio.nanmedian(1, keepdim=True).values
        near = torch.where(unscaled == 0, found == 0, (ratio / middle - 1).abs() < _NEAR)
        what = f"{format_name(part.kind, part.group)}, {base.codes.coding}"
        if not bool(near.all()):
            row, column = (~near).nonzero()[0].tolist()
            expected = float((unscaled * middle.nan_to_num(1.0))[row, column])
            first = Difference(rows[row], column, expected, float(found[row, column]))
            self._see(Rejected(f"it is not {what}", str(first)), _Near.ELEMENTS, float(near.double().mean()))
            return
        factors = list(self._factors(base.window, middle[:, 0], rows, part.codes.device))
        if not factors:
            why = f"{what} but for a factor that no tensor and no number of the graph gives"
            self._see(Rejected(why, f"{float(middle[0, 0]):.7g}"), _Near.FACTOR)
        for factor, values in factors:
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
            leaves = [self.leaves[self.decode.leaves.index(leaf)] for leaf in part.leaves]
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

    def _read_scales(self, source: Source, window: Window, group: int) -> tuple[Tensor, Tensor | None] | None:
        key = source, window, group
        if key not in self.scales:
            try:
                self.scales[key] = source.read_scales(self.decode, self.leaves, window, group)
            except ValueError:
                self.scales[key] = None
        return self.scales[key]

    def _factors(
        self, window: Window, wanted: Tensor, rows: list[int], device: torch.device
    ) -> Iterator[tuple[Factor, Tensor]]:
        """The tensors and numbers that are near the factor that rows want, with their values for these rows."""
        for factor in factors_in(self.decode, window):
            values = factor.value(self.decode, self.leaves, window, device)[rows]
            for divides in (False, True):
                applied = values.reciprocal() if divides else values
                if bool(((applied / wanted - 1).abs() < _NEAR).all()):
                    yield Factor(factor.node, factor.number, divides), values
                if factor == Factor():
                    break

    def _computed_in(self, dtype: torch.dtype) -> set[torch.dtype]:
        halves = {torch.float16, torch.bfloat16}
        return {dtype} if dtype in halves else halves & {value.dtype for _, value in self.decode.tensors}

    def _see(self, refusal: Rejected, near: _Near, share: float = 0.0) -> None:
        """Remembers the hypothesis that came nearest; ``share`` of the elements were right."""
        if (near, share) > self.agreement:
            self.agreement, self.nearest = (near, share), refusal

    def _sizes(self) -> str:
        rows, k = self.decode.rows, self.decode.matrices.k
        if self.scales:
            return "its block scales are not E4M3 or E8M0 numbers times one factor a row"
        for _, value in self.decode.tensors:
            group = rows * k // max(1, value.numel())
            if value.numel() * group == rows * k and 4 <= group <= 1024 and group not in GROUP_SIZES and k % group == 0:
                return f"its scales would belong to groups of {group}, expected {' or '.join(map(str, GROUP_SIZES))}"
        return f"no tensor has the size of block scales of [{rows}, {k}] in groups of 16 or 32 along its columns"
