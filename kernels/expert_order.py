"""The order in which the rows of an expert's first product are packed.

The first product of a gated expert has gate and up rows. Packed, they stand in pairs of eight: row ``16 j + g`` is gate
``8 j + g`` and row ``16 j + 8 + g`` is up ``8 j + g`` (g < 8). These are the rows r = 0 and 1 of one lane in a fragment
(layout.py), so that the kernel has both in one thread when its sums are done. What stands between the products is
padded to whole groups of the second one, with rows of zeros.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

# Which rows of the first product are gates: the first half, the last half, the even ones, the odd ones.
Order = Literal["gate_up", "up_gate", "interleaved", "interleaved_up_gate"]
ORDERS: tuple[Order, ...] = get_args(Order)
PAIR = 8


def unpaired(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and ups ``[..., rows / 16, 8]`` of packed rows."""
    gate, up = sums.unflatten(-1, (-1, 2, PAIR)).unbind(-2)
    return gate, up


def packed_rows(intermediate: int, width: int, order: Order | None) -> Tensor:
    """The row of the first product that stands at each packed row, -1 where one of zeros does.

    Args:
        intermediate: gates, or rows of a product that has none.
        width: what that is padded to.
        order: see `pack_experts`.
    """
    at = torch.arange(width if order is None else 2 * width)
    if order is None:
        return torch.where(at < intermediate, at, -1)
    unit, up = at // (2 * PAIR) * PAIR + at % PAIR, at // PAIR % 2
    if order.startswith("interleaved"):
        row = 2 * unit + (up if order == "interleaved" else 1 - up)
    else:
        row = unit + (up if order == "gate_up" else 1 - up) * intermediate
    return torch.where(unit < intermediate, row, -1)


def places(intermediate: int, width: int, order: Order | None) -> Tensor:
    """The packed row at which each row of the first product stands."""
    rows = packed_rows(intermediate, width, order)
    return torch.where(rows < 0, len(rows), rows).argsort()[: intermediate * (1 if order is None else 2)]
