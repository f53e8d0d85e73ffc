"""``marlin_w4a16::dequantize``: the dense weight of a packed one."""

from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.fake_impls.library import (
    DTYPES,
    checked_weight,
    expect,
    packed_of,
    register,
    split_weight,
    weight_args,
    weight_schema,
)
from marlin_w4a16.kernels.blocks import dequantize as blocks
from marlin_w4a16.kernels.layout import PackedFP4

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def dequantize(packed: PackedFP4, dtype: torch.dtype) -> Tensor:
    """The dense ``[n, k]`` weight: the exact value rounded once to ``dtype`` (float16, bfloat16 or float32)."""
    result: Tensor = torch.ops.marlin_w4a16.dequantize(*weight_args(packed), str(dtype).removeprefix("torch."))
    return result


def _checked(args: tuple[Any, ...]) -> tuple[PackedFP4, torch.dtype]:
    weight, (name,) = split_weight(args)
    packed = checked_weight("dequantize", packed_of(weight).multiplier, "n", weight)
    expect(name in _DTYPES, "dequantize", "dtype", repr(name), f"one of {tuple(_DTYPES)}")
    return packed, _DTYPES[name]


def _fake(*args: Any) -> Tensor:
    packed, dtype = _checked(args)
    return packed.multiplier.new_empty((packed.n, packed.k), dtype=dtype)


def _dense(*args: Any) -> Tensor:
    return blocks.dequantize(*_checked(args))


register(f"dequantize({weight_schema()}, str dtype) -> Tensor", _dense, _dense, _fake)
