"""What becomes of each number that may stand among the ids of a mixture: those of experts, and those of none."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.passes.find.routes import Call

# What becomes of a number that leads to no expert: it adds nothing, it does what nobody may rely on, such as an index
# that does not exist, or it adds something else than an expert's row times its routing weight.
NOTHING, UNDEFINED, OTHER = -1, -2, -3
_FAR = 1 << 30
_MOST = 64  # integers of which sums and differences are looked at


class Negatives(Enum):
    """What the model takes ids below zero for, where nothing says that there are none."""

    NONE = "none"  # of no expert, as the op does
    FROM_THE_END = "counted from the end"
    FIRST = "the first expert"

    def applied(self, call: Call, ids: Any, experts: int) -> Any:
        """The ids of which the op makes what the model makes of ``ids``."""
        if self is Negatives.FROM_THE_END:
            return call(torch.remainder, ids, experts)
        return call(torch.clamp, ids, 0) if self is Negatives.FIRST else ids


@dataclass(frozen=True, slots=True)
class Choices:
    """The numbers that ids may be.

    Attributes:
        experts: how many experts there are.
        numbers: ``[d]``, in the type of the ids: every expert, then some of the others.
        apart: sums and differences of what the graph holds are among them.
    """

    experts: int
    numbers: Tensor
    apart: bool = True

    @classmethod
    def of(cls, experts: int, dtype: torch.dtype, met: Iterable[int] | None) -> "Choices":
        """Those of ids of a type.

        ``met``: integers that a graph holds, around each of which, their sums and differences, what it does to numbers
        of no expert may change; None: there are no such numbers.
        """
        limits, held = torch.iinfo(dtype), set(met or ())
        others = () if met is None else _of_none(experts, held)
        fit = (number for number in others if limits.min <= number <= limits.max)
        return cls(experts, torch.tensor([*range(experts), *fit], dtype=dtype), len(held) <= _MOST)

    @property
    def sure(self) -> bool:
        """Whether there are none of no expert."""
        return len(self.numbers) == self.experts

    def indexed(self, table: Tensor) -> Tensor:
        """The expert of each number that indexes a stack as ``table`` says."""
        found = torch.where(table < 0, table + self.experts, table)
        return torch.where((found >= 0) & (found < self.experts), found, UNDEFINED)

    def are_right(self, fate: Tensor) -> bool:
        """Whether each expert's number leads to that expert."""
        return bool((fate[: self.experts] == self.numbers[: self.experts]).all())

    def negatives(self, fate: Tensor) -> Negatives | None:
        """How the op is to be given ids so that each number has its fate, or None."""
        for way in Negatives:
            given = torch.where(self.numbers < _FAR, way.applied(lambda f, *a: f(*a), self.numbers, self.experts), _FAR)
            done = torch.where((given >= 0) & (given < self.experts), given, NOTHING)
            if bool(((fate == done) | (fate == UNDEFINED)).all()):
                return way
        return None


def _of_none(experts: int, met: set[int]) -> dict[int, None]:
    """Numbers of no expert: the next ones, some around powers of two, as many as there are experts around others."""
    powers = [sign << bit for bit in range(64) for sign in (1, -1)]
    about = [sign * n for n in met for sign in (1, -1)]
    near = [n + step for n in (experts, 2 * experts, -experts, *about) for step in range(-2, experts + 2)]
    pairs = ((n, m) for n in about for m in about) if len(met) <= _MOST else ()
    apart = [n + m + step for n, m in pairs for step in (-1, 0, 1)]
    around = [n + step for n in powers for step in (-1, 0, 1)]
    return dict.fromkeys(n for n in (*around, *near, *apart) if not 0 <= _as_int32(n) < experts)


def _as_int32(number: int) -> int:
    """What a cast makes of it; no model relies on ids beyond 32 bits that one takes for an expert's."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
