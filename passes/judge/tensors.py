"""Tensor classes that are FP4 weights: torchao's ``NVFP4Tensor`` and ``MXTensor``; read in torchao 0.18."""

from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight, fp4_weight
from marlin_w4a16.kernels.scale_bytes import unswizzle
from marlin_w4a16.passes.outcome import Rejected

_NAMES = ("NVFP4Tensor", "MXTensor")


def is_typed(value: object) -> bool:
    """Whether a tensor is of one of these classes."""
    return type(value).__module__.partition(".")[0] == "torchao" and type(value).__name__ in _NAMES


def is_fp4(value: Any) -> bool:
    """Whether a tensor of these classes holds E2M1 codes: an ``MXTensor`` may hold other elements."""
    return type(value).__name__ == "NVFP4Tensor" or value.elem_dtype == torch.float4_e2m1fn_x2


def activations(value: Any) -> str | None:
    """How a product with a tensor of these classes quantises its other operand, or None."""
    if value.act_quant_kwargs is None:
        return None
    return type(value.act_quant_kwargs).__name__.removeprefix("QuantizeTensorTo").removesuffix("Kwargs")


def dense(value: Tensor) -> Tensor:
    """The value as a plain tensor; of these classes, what its producer decodes it to."""
    return value.dequantize() if is_typed(value) else value


def read(value: Any, name: str) -> FP4Weight | Rejected:
    """The weight of a tensor ``[..., n, k]``, leading axes as rows."""
    k = value.shape[-1]
    rows = value.numel() // k
    if value.qdata.shape[-1] * 2 != k or not value.qdata.is_contiguous():
        return Rejected(f"its codes have shape {tuple(value.qdata.shape)}, expected rows [{rows}, {k // 2}]")
    columns = k // value.block_size
    scales = value.scale
    if value.is_swizzled_scales:
        if value.ndim != 2:
            return Rejected(f"its swizzled scales belong to {value.ndim} dimensions, expected 2")
        scales = unswizzle(scales, rows, columns)
    factor = getattr(value, "per_tensor_scale", None)
    multiplier: Tensor | float = 1.0
    if factor is not None:
        multiplier = factor.reshape(-1).repeat_interleave(rows // factor.numel())
    codes = value.qdata.reshape(rows, k // 2).view(torch.uint8)
    return fp4_weight(codes, scales.reshape(rows, columns), multiplier, name=name)
