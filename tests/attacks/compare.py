"""Whether two runs of the same programs gave the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIMITS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}
Call = list[Tensor]  # what came out of a call: the result, gradients, the inputs after it, the buffers after it


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two runs differ.

    Attributes:
        call: the number of the call.
        place: 0 for the result, then gradients, inputs and buffers.
        why: in words.
    """

    call: int
    place: int
    why: str

    def __str__(self) -> str:
        return f"call {self.call}, {'result' if self.place == 0 else f'value {self.place} after it'}: {self.why}"


def compare(
    found: Sequence[Call], expected: Sequence[Call], near: Sequence[Sequence[Call]] = (), limit: float = 0.0
) -> Difference | None:
    """The first difference of two runs, or None.

    Args:
        found, expected: call by call.
        near: what would be expected of inputs that are a rounding away: a row may differ by a few times as much.
        limit: the least relative difference of a row that counts, where it is more than that of its dtype.
    """
    for call, (some, others) in enumerate(zip(found, expected, strict=True)):
        for place, (a, b) in enumerate(zip(some, others, strict=True)):
            beside = [run[call][place] for run in near if run]
            if why := _why(a, b, beside, limit):
                return Difference(call, place, why)
    return None


def _why(found: Tensor, expected: Tensor, near: Sequence[Tensor], limit: float) -> str | None:
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    if not (found.is_floating_point() and found.numel()):
        return None if torch.equal(found, expected) else "other integers"
    if found.dtype not in LIMITS:
        return None if torch.equal(found.view(torch.uint8), expected.view(torch.uint8)) else "other bytes"
    limit = max(limit, LIMITS[found.dtype])
    found, expected = _rows(found), _rows(expected)
    noise = torch.stack([_distance(_rows(other), expected) for other in near]).amax(0) if near else torch.zeros(1)
    distance = _distance(found, expected)
    wrong = distance > (4 * noise).clamp(min=limit)
    if not wrong.any():
        return None
    worst = float(distance[wrong].max())
    return f"they differ by {worst:.2g}" if worst < torch.inf else "other elements are finite"


def _rows(t: Tensor) -> Tensor:
    return t.double().reshape(-1, t.shape[-1] if t.ndim else 1)


def _distance(found: Tensor, expected: Tensor) -> Tensor:
    """Of each row, relative to its norm, or to a thousandth of what rows have; infinite where finiteness differs."""
    fine, alike = expected.isfinite(), (found.isfinite() == expected.isfinite()).all(-1)
    a, b = found.where(fine, 0).nan_to_num(), expected.where(fine, 0)
    size = b.norm(dim=-1)
    distance = (a - b).norm(dim=-1) / size.clamp(min=max(1e-3 * float(size.mean()), 1e-30))
    return distance.where(alike, torch.inf)
