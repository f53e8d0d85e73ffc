"""Reads the codes of a dense weight back, given its scales: it is taken only if they give every bit of it again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight, as_bytes
from marlin_w4a16.kernels.layout import PAD_SCALE
from marlin_w4a16.kernels.quantize import encode, pack_nibbles
from marlin_w4a16.kernels.scale_bytes import ScaleKind, scale_table
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import FoundModule, bytes_of

# How producers multiply code, scale and factor, in float32.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "code * (scale * factor)": lambda c, s, f: c * (s * f),
    "code * (scale / factor)": lambda c, s, f: c * (s / f),
    "(code * scale) * factor": lambda c, s, f: (c * s) * f,
}


def recover(
    value: Tensor, scales: Sequence[Tensor], factor: Tensor, kind: ScaleKind, *, divides: bool = False
) -> tuple[FP4Weight, str] | Rejected:
    """The weight that decodes to ``value``, bit for bit, and the name of the formula that does it.

    Args:
        value: ``[n, k]``, a float dtype.
        scales: bytes ``[n, k / group]``; of several, each block takes the first that is right.
        factor: float32 scalar, the global scale.
        kind: as in `FP4Weight`.
        divides: the global scale is a divisor.
    """
    n, k = value.shape
    candidates = [as_bytes(s) for s in scales]
    group = k // candidates[0].shape[1]
    multiplier = (factor.reciprocal() if divides else factor).expand(n).contiguous()
    codes = torch.empty((n, k // 2), dtype=torch.uint8, device=value.device)
    weight = FP4Weight(codes, torch.empty_like(candidates[0]).fill_(PAD_SCALE[kind]), multiplier, kind, group)
    for formula in FORMULAS:
        parts = ((value[rows], [s[rows] for s in candidates], part) for rows, part in weight.row_blocks())
        if all(_recover_rows(found, options, part, factor, formula) for found, options, part in parts):
            return weight, formula
    return Rejected("its dense weight is not, bit for bit, the decode of codes with the scales on the module")


def quantised(run: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor | Rejected:
    """What a fake quantiser makes of a weight, if it leaves that as it is."""
    value = run(weight)
    if not torch.equal(value, run(value)):  # the sign of a zero may change
        return Rejected("its fake quantiser gives other values when it is run on its own output")
    return value


def found_dense(weight: Tensor, recovered: tuple[FP4Weight, str] | Rejected, **kept: Any) -> FoundModule | Rejected:
    """What a module with a dense weight holds, by what `recover` found in it; `dense` needs what is kept."""
    if isinstance(recovered, Rejected):
        return recovered
    kept |= {"formula": recovered[1], "dtype": weight.dtype, "requires_grad": weight.requires_grad}
    return FoundModule((recovered[0],), weight.dtype, bytes_of(weight), kept)


def dense(weight: FP4Weight, factor: Tensor, formula: str, dtype: torch.dtype) -> Tensor:
    """The dense weight ``[n, k]`` as a producer's formula gives it."""
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.codes.device)
    for rows, part in weight.row_blocks():
        out[rows] = _part(part, factor, formula, dtype)
    return out


def _recover_rows(value: Tensor, scales: Sequence[Tensor], part: FP4Weight, factor: Tensor, formula: str) -> bool:
    """Writes codes and scales of some rows; says whether every block came out right."""
    blocks = value.reshape(*part.scales.shape, part.group)
    right = torch.zeros_like(part.scales, dtype=torch.bool)
    for option in scales:
        step = scale_table(part.kind, value.device, torch.float32)[option.int()] * part.multiplier[:, None]
        near = encode((blocks.float() / step.unsqueeze(-1)).nan_to_num(0.0)) | (blocks.signbit() << 3)
        packed = pack_nibbles(near.flatten(1).to(torch.uint8)).reshape(*part.scales.shape, part.group // 2)
        held = part.codes.reshape_as(packed)
        part.codes.copy_(torch.where(right.unsqueeze(-1), held, packed).flatten(1))
        part.scales.copy_(torch.where(right, part.scales, option))
        again = _part(part, factor, formula, value.dtype)
        right = (_bits(again) == _bits(value)).reshape_as(blocks).all(-1)
        if bool(right.all()):
            return True
    return False


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _part(part: FP4Weight, factor: Tensor, formula: str, dtype: torch.dtype) -> Tensor:
    codes, scales = part.factors(torch.float32)
    return FORMULAS[formula](codes, scales.unsqueeze(-1), factor).flatten(1).to(dtype)
