"""The order in which the rows of an expert's first product are packed.

The first product of a gated expert has gate and up rows. Packed, they stand in pairs of eight: row ``16 j + g`` is gate
``8 j + g`` and row ``16 j + 8 + g`` is up ``8 j + g`` (g < 8). These are the rows r = 0 and 1 of one lane in a fragment
(layout.py), so that the kernel has both in one thread when its sums are done. What stands between the products is
padded to whole groups of the second one, with rows of zeros.
"""

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import pad

PAIR = 8


class Order(str, Enum):
    """Which rows of the first product are gates: the first half, the last half, the even ones, the odd ones.

    Each is its string too, and is shown as that.

    Raises:
        ValueError: another string was given.
    """

    GATE_UP = "gate_up"
    UP_GATE = "up_gate"
    INTERLEAVED = "interleaved"
    INTERLEAVED_UP_GATE = "interleaved_up_gate"

    @property
    def interleaved(self) -> bool:
        """Whether a gate and its up stand side by side, not in halves."""
        return self in (Order.INTERLEAVED, Order.INTERLEAVED_UP_GATE)

    @property
    def up_first(self) -> bool:
        """Whether ups stand before their gates."""
        return self in (Order.UP_GATE, Order.INTERLEAVED_UP_GATE)

    def slices(self, rows: int) -> tuple[slice, slice]:
        """The gates and the ups among ``rows`` rows."""
        halves = slice(0, rows // 2), slice(rows // 2, None)
        first, second = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else halves
        return (second, first) if self.up_first else (first, second)

    __str__ = str.__str__
    __repr__ = str.__repr__

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"order: found {value!r}, expected one of {ORDERS}")


ORDERS = tuple(Order)


def kinds(order: Order | str | None, rows: int) -> tuple[slice, ...]:
    """The gates and the ups among ``rows`` rows; all of them where there is no order."""
    return (slice(None),) if order is None else Order(order).slices(rows)


def gates_and_ups(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and ups ``[..., rows / 16, 8]`` of packed rows."""
    gate, up = sums.unflatten(-1, (-1, 2, PAIR)).unbind(-2)
    return gate, up


def packed_rows(intermediate: int, width: int, order: Order | str | None) -> Tensor:
    """The row of the first product that stands at each packed row, -1 where one of zeros does.

    Args:
        intermediate: gates, or rows of a product that has none.
        width: what that is padded to.
        order: see `pack_experts`.
    """
    rows = torch.arange(intermediate if order is None else 2 * intermediate)
    parts = [pad(rows[at], (0, width - intermediate), value=-1) for at in kinds(order, len(rows))]
    return parts[0] if order is None else torch.stack([part.view(-1, PAIR) for part in parts], 1).flatten()


def places(intermediate: int, width: int, order: Order | str | None) -> Tensor:
    """The packed row at which each row of the first product stands."""
    rows = packed_rows(intermediate, width, order)
    return torch.where(rows < 0, len(rows), rows).argsort()[: intermediate * (1 if order is None else 2)]
