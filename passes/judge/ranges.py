"""Weights that the model rounds to float16, beyond what float16 holds: the op, which rounds none, is no such model."""

import torch

from marlin_w4a16.kernels.fp4 import E2M1_MAX, FP4Weight
from marlin_w4a16.kernels.scale_bytes import scale_table
from marlin_w4a16.passes.judge.roundings import largest_error
from marlin_w4a16.passes.outcome import Rejected

_HALF = torch.finfo(torch.float16)
_SMALLEST_CODE = 0.5
_ROUNDED_ONCE = _HALF.eps / 2  # the largest relative difference where float16 is normal


def out_of_range(weight: FP4Weight, dtype: torch.dtype, tolerance: float) -> Rejected | None:
    """Why a weight ``[n, k]`` of products in ``dtype`` is left: float16 makes it infinite, or rounds it to few bits.

    It may be the traced weight that is float16, or an autocast that makes it so.
    """
    if dtype is not torch.float16 or _is_normal(weight):
        return None
    worst = 0.0
    for _, part in weight.row_blocks():
        exact = part.decode()
        rounded = exact.half()
        if not bool(rounded.isfinite().all()):
            return Rejected("beyond float16, to which the model rounds it", f"it holds {float(exact.abs().max()):.3g}")
        worst = max(worst, largest_error(part, rounded))
    if worst <= max(tolerance, _ROUNDED_ONCE):
        return None
    accepts = f"options={{'tolerance': {worst * 1.01:.3g}}} accepts it"
    return Rejected(
        "below float16's normal range, to which the model rounds it",
        f"the model's weight differs from its exact decode by up to {worst:.2g}; {accepts}",
    )


def _is_normal(weight: FP4Weight) -> bool:
    """Whether every code other than zero would be normal in float16, with each of the scales."""
    for _, part in weight.row_blocks():
        scales = scale_table(part.kind, part.scales.device, torch.float64)[part.scales.int()]
        size = (scales * part.multiplier.double().unsqueeze(-1)).abs()
        if bool(((size * E2M1_MAX > _HALF.max) | ((size > 0) & (size * _SMALLEST_CODE < _HALF.tiny))).any()):
            return False
    return True
