"""The input of a W4A4 product: rounded to FP4 blocks and back, in plain torch, so that any compiler can fuse it."""

from typing import Literal

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import E2M1_MAX
from marlin_w4a16.kernels.scale_bytes import E4M3_MAX, E8M0_BIAS, ScaleKind

# How an E8M0 scale is rounded: compressed-tensors rounds amax to two bits ("near"), ModelOpt takes
# 2 ** ceil(log2(amax / 6)) ("up").
Rounding = Literal["near", "up"]


def fake_quantize(
    x: Tensor, kind: ScaleKind, group: int, scale: Tensor | None = None, rounding: Rounding = "near"
) -> Tensor:
    """Quantises each block of ``x`` to FP4 and decodes it again.

    Args:
        x: ``[..., k]`` with k a multiple of the group.
        kind: of the block scales, which are computed from ``x``.
        group: elements that share one.
        scale: float32 scalar, the global scale as a multiplier; None is 1.
        rounding: of E8M0 scales.

    Returns:
        Values in the dtype of ``x``, rounded once more to it.
    """
    blocks: Tensor = x.float().unflatten(-1, (-1, group))
    amax = blocks.abs().amax(-1, keepdim=True)
    if kind == "e4m3":
        factor = torch.ones((), device=x.device) if scale is None else scale
        # a scale that rounds to 0 makes its block 0, as with both producers
        step = (amax / (E2M1_MAX * factor)).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * factor
    else:
        fraction, exponent = torch.frexp(amax)  # amax = fraction * 2**exponent, fraction in [0.5, 1)
        exponent = exponent - 3 + (fraction > 0.75 if rounding == "up" else fraction >= 0.875).int()
        step = torch.ldexp(torch.ones_like(amax), exponent.clamp(-E8M0_BIAS + 1, E8M0_BIAS))
    rounded: Tensor = round_e2m1(blocks / torch.where(step == 0, 1.0, step)) * step
    return rounded.flatten(-2).to(x.dtype)


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 values, ties to the even code: `torch.round` rounds ties to even on each of the three grids."""
    size = values.abs()
    near = torch.where(
        size < 2, torch.round(size * 2) / 2, torch.where(size < 4, torch.round(size), torch.round(size / 2) * 2)
    )
    return torch.copysign(near.clamp(max=E2M1_MAX), values)
