"""Quantisers from dense weights to FP4.

NVFP4 follows NVIDIA ModelOpt (amax of the tensor and of each block), MXFP4 the OCP Microscaling specification v1.0;
both round to nearest, ties to even. They work in blocks of rows, so that beyond codes and scales only a few tens of
megabytes are taken.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import BLOCK_ELEMENTS, E2M1_MAX, FP4Weight, as_bytes, fp4_weight, row_slices
from marlin_w4a16.kernels.scale_bytes import E4M3_MAX, E4M3_TINY, ScaleKind, e8m0_exponents, e8m0_of

# Midpoints between neighbouring magnitudes; a tie goes to the even code, which is the upper one at odd positions.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)
_ELEMENTS = BLOCK_ELEMENTS // 2  # at about 50 bytes each, in float64 and indices of int64


def quantize_nvfp4(weight: Tensor, group: int = 16, name: str = "weight") -> FP4Weight:
    """Quantises ``[n, k]`` to E2M1 codes, E4M3 block scales and one global scale, as ModelOpt does.

    The global scale is ``amax / (6 * 448)``, a block's scale ``amax_block / (6 * global)`` rounded to E4M3 and kept
    at or above 2**-9 (1.0 for a block of zeros).
    """
    blocks, amax = _blocks(weight, group, name)
    global_scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    if global_scale == 0:
        global_scale = torch.ones_like(global_scale)

    def rows(part: Tensor) -> tuple[Tensor, Tensor]:
        scale = nvfp4_scales(part, global_scale)
        return encode(part / (scale.float() * global_scale).unsqueeze(-1)), scale

    return _by_rows(blocks, rows, global_scale, "e4m3", name)


def nvfp4_scales(blocks: Tensor, global_scale: Tensor) -> Tensor:
    """The E4M3 scales of blocks ``[n, k / group, group]`` under a global scale, by ModelOpt's rule (see above)."""
    scale = blocks.abs().amax(-1).float() / (E2M1_MAX * global_scale)
    scale[scale == 0] = 1.0
    return scale.clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_mxfp4(weight: Tensor, group: int = 32, name: str = "weight") -> FP4Weight:
    """Quantises ``[n, k]`` to E2M1 codes and E8M0 block scales ``2 ** (floor(log2(amax_block)) - 2)``."""
    blocks, _ = _blocks(weight, group, name)
    return _by_rows(blocks, _mxfp4_rows, 1.0, "e8m0", name)


def _mxfp4_rows(part: Tensor) -> tuple[Tensor, Tensor]:
    part = part.double()  # ldexp by an exponent below -126 would flush in float32
    _, exponent = torch.frexp(part.abs().amax(-1))  # amax = m * 2**exponent, m in [0.5, 1)
    byte = e8m0_of(exponent - 3)
    return encode(torch.ldexp(part, -e8m0_exponents(byte).unsqueeze(-1))), byte


def _by_rows(
    blocks: Tensor,
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]],
    multiplier: Tensor | float,
    kind: ScaleKind,
    name: str,
) -> FP4Weight:
    """Quantises ``[n, k / group, group]`` a few rows at a time."""
    n, groups, group = blocks.shape
    codes = torch.empty((n, groups * group // 2), dtype=torch.uint8, device=blocks.device)
    scales = torch.empty((n, groups), dtype=torch.uint8, device=blocks.device)
    for at in row_slices(n, groups * group, _ELEMENTS):
        part, scale = quantize(blocks[at])
        codes[at], scales[at] = pack_nibbles(part.flatten(1)), as_bytes(scale)
    return fp4_weight(codes, scales, multiplier, kind=kind, name=name)


def _blocks(weight: Tensor, group: int, name: str) -> tuple[Tensor, Tensor]:
    """A weight as ``[n, k / group, group]``, and its largest magnitude."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: found {weight.dtype} of shape {tuple(weight.shape)}, expected floats [n, k]")
    if weight.shape[1] % group:
        raise ValueError(f"{name}: found k = {weight.shape[1]}, expected a multiple of the group {group}")
    weight = weight.detach()
    low, high = torch.aminmax(weight) if weight.numel() else weight.new_zeros(2)  # NaN if there is one; takes no memory
    amax = torch.maximum(-low, high)
    if not bool(amax.isfinite()):
        raise ValueError(f"{name}: found NaN or Inf, expected finite values")
    return weight.unflatten(1, (-1, group)), amax


def encode(values: Tensor) -> Tensor:
    """The codes nearest to values that were divided by their scales; beyond 6 the largest one."""
    magnitude = values.abs().contiguous()
    code = torch.bucketize(magnitude, magnitude.new_tensor(_MIDPOINTS))
    for tie in _TIES_UP:
        code += magnitude == tie
    return (code + 8 * (values < 0)).to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes ``[n, k]`` as bytes ``[n, k / 2]``, the even column in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
