"""What traced operations round on the way to a weight, and whether a value is what they give.

A weight that is rounded once, at the end, *equals* its decode. One that is computed in 16 bits is rounded more often;
each way to do that must give every bit of the traced weight. The op then computes with the exact
decode, nearer to the checkpoint than the model itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.passes.graph.names import dtype_name

# A traced float32 value may differ from the exact one by the roundings of two products in any order.
FLOAT32_ULPS = 2
EXACT = "exact"

_Round = Callable[[Tensor], Tensor]
_Apply = Callable[[Tensor, Tensor], Tensor]

# Code, scale, factor; how a factor is applied (times or divided by); the rounding to 16 bits -> float32 value.
_WAYS: dict[str, tuple[int, Callable[[Tensor, Tensor, Tensor, _Apply, _Round], Tensor]]] = {
    "weight": (1, lambda c, s, m, by, r: r(by(c * s, m))),
    "scale": (1, lambda c, s, m, by, r: c * r(by(s, m))),
    "scale, weight": (2, lambda c, s, m, by, r: r(c * r(by(s, m)))),
    "factor, weight": (2, lambda c, s, m, by, r: r(by(c * s, r(m)))),
    "factor, scale, weight": (3, lambda c, s, m, by, r: r(c * r(by(s, r(m))))),
    "code, weight": (2, lambda c, s, m, by, r: r(r(by(c, m)) * s)),
    "factor, code, weight": (3, lambda c, s, m, by, r: r(r(by(c, r(m))) * s)),
    "factor, reciprocal, weight": (3, lambda c, s, m, by, r: r(c * s * r(1 / r(m)))),
    "factor, reciprocal, scale, weight": (4, lambda c, s, m, by, r: r(c * r(s * r(1 / r(m))))),
}
_TIMES = {1: "once", 2: "twice", 3: "three times", 4: "four times"}


@dataclass(frozen=True, slots=True)
class Roundings:
    """What is rounded to 16 bits on the way.

    Attributes:
        rounds: names of what is rounded, in their order; a row name of this file's table, or ``EXACT``.
        dtype: to what it is rounded.
        divides: the factor divides.
    """

    rounds: str = EXACT
    dtype: torch.dtype = torch.float32
    divides: bool = False

    @property
    def exact(self) -> bool:
        """Whether nothing but the weight itself is rounded."""
        return self.rounds == EXACT

    def __str__(self) -> str:
        if self.exact:
            return EXACT
        times = _TIMES[_WAYS[self.rounds][0]]
        return f"rounded {times} in the model ({dtype_name(self.dtype)}: {self.rounds})"

    @property
    def tolerance(self) -> tuple[float, str]:
        """The relative difference that its roundings stay within, half a unit in the last place each; and its name."""
        count, unit = _WAYS[self.rounds][0], math.frexp(torch.finfo(self.dtype).eps / 2)[1] - 1
        names = {1: f"2**{unit}", 2: f"2**{unit + 1}", 3: f"3 * 2**{unit}", 4: f"2**{unit + 2}"}
        return count * 2.0**unit, names[count]

    def predict(self, part: FP4Weight, factor: Tensor) -> Tensor:
        """What it gives in float32, ``[n, k]``; ``factor`` is the model's own, one for each row."""
        codes, scales = part.factors(torch.float32)
        scales = scales.unsqueeze(-1)
        if self.exact:
            return ((codes * scales) * part.multiplier[:, None, None]).flatten(1)
        by: _Apply = torch.div if self.divides else torch.mul
        _, computed = _WAYS[self.rounds]
        return computed(codes, scales, factor[:, None, None], by, lambda t: t.to(self.dtype).float()).flatten(1)


def roundings_of(traced: torch.dtype, computed_in: set[torch.dtype], divides: bool) -> list[Roundings]:
    """The roundings by which a weight of a dtype may have been computed, the exact one first."""
    found = [Roundings()]
    for dtype in sorted(computed_in, key=str):
        rounds = [name for name in _WAYS if traced != dtype or name not in ("weight", "scale")]
        rounds = [name for name in rounds if divides or "reciprocal" not in name]
        found += [Roundings(name, dtype, divides) for name in rounds]
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """The first element that is not what roundings give.

    Attributes:
        row, column: where.
        expected, found: the values.
    """

    row: int
    column: int
    expected: float
    found: float

    def __str__(self) -> str:
        expected, found = self.expected + 0.0, self.found + 0.0  # zero without a sign
        return f"row {self.row}, column {self.column}: expected {expected:.7g}, found {found:.7g}"


def first_difference(roundings: Roundings, weight: FP4Weight, factor: Tensor, value: Tensor) -> Difference | None:
    """The first difference between a traced weight ``[n, k]`` and what roundings give, rounded to its dtype."""
    for rows, part in weight.row_blocks():
        predicted, found = roundings.predict(part, factor[rows]), value[rows]
        wrong = predicted.to(value.dtype) != found
        if roundings.exact and bool(wrong.any()):
            size = predicted.abs()
            slack = FLOAT32_ULPS * (torch.nextafter(size, torch.full_like(size, torch.inf)) - size)
            low, high = (predicted - slack).to(value.dtype), (predicted + slack).to(value.dtype)
            wrong = ~((low <= found) & (found <= high))
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            at = float(predicted[row, column].to(value.dtype)), float(found[row, column])
            return Difference(rows.start + row, column, *at)
    return None


def largest_error(weight: FP4Weight, value: Tensor) -> float:
    """The largest ``|value - decode| / |decode|`` of all elements; infinite where zeros are not zero."""
    worst = 0.0
    for rows, part in weight.row_blocks():
        exact = part.decode()
        error = (value[rows].double() - exact).abs()
        ratio = torch.where(exact == 0, torch.where(error == 0, 0.0, torch.inf), error / exact.abs())
        worst = max(worst, float(ratio.max())) if ratio.numel() else worst
    return worst
