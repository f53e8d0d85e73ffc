"""Reads the codes of a dense weight back, given its scales: it is taken only if they give every bit of it again."""

from collections.abc import Callable

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight, ScaleKind, as_bytes
from marlin_w4a16.kernels.quantize import encode, pack_nibbles
from marlin_w4a16.passes.outcome import Rejected

# How producers multiply code, scale and factor, in float32.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "code * (scale * factor)": lambda c, s, f: c * (s * f),
    "code * (scale / factor)": lambda c, s, f: c * (s / f),
    "(code * scale) * factor": lambda c, s, f: (c * s) * f,
}


def recover(
    value: Tensor, scales: Tensor, factor: Tensor, kind: ScaleKind, *, divides: bool = False
) -> tuple[FP4Weight, str] | Rejected:
    """The weight that decodes to ``value``, bit for bit, and the name of the formula that does it.

    Args:
        value: ``[n, k]``, a float dtype.
        scales: bytes ``[n, k / group]``.
        factor: float32 scalar, the global scale.
        kind: as in `FP4Weight`.
        divides: the global scale is a divisor.
    """
    n, k = value.shape
    codes = torch.empty((n, k // 2), dtype=torch.uint8, device=value.device)
    multiplier = (factor.reciprocal() if divides else factor).expand(n).contiguous()
    weight = FP4Weight(codes, as_bytes(scales).contiguous(), multiplier, kind, k // scales.shape[1])
    for rows, part in weight.row_blocks():
        step = part.factors(torch.float32)[1].unsqueeze(-1) * part.multiplier[:, None, None]
        blocks = value[rows].float().reshape(*part.scales.shape, weight.group)
        near = encode((blocks / step).nan_to_num(0.0)) | (blocks.signbit() << 3)
        codes[rows] = pack_nibbles(near.flatten(1).to(torch.uint8))
    for formula in FORMULAS:
        if _gives(value, weight, factor, formula):
            return weight, formula
    return Rejected("its dense weight is not, bit for bit, the decode of codes with the scales on the module")


def dense(weight: FP4Weight, factor: Tensor, formula: str, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[n, k]`` as a producer's formula gives it."""
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.codes.device)
    for rows, part in weight.row_blocks():
        out[rows] = _part(part, factor, formula, dtype)
    return out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors hold the same bits, signs of zeros included."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def _gives(value: Tensor, weight: FP4Weight, factor: Tensor, formula: str) -> bool:
    parts = ((value[rows], _part(part, factor, formula, value.dtype)) for rows, part in weight.row_blocks())
    return all(same_bits(found.contiguous(), expected) for found, expected in parts)


def _part(part: FP4Weight, factor: Tensor, formula: str, dtype: torch.dtype) -> Tensor:
    codes, scales = part.factors(torch.float32)
    return FORMULAS[formula](codes, scales.unsqueeze(-1), factor).flatten(1).to(dtype)
