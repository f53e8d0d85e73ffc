"""Linears whose weight torchao made an ``NVFP4Tensor`` (``NVFP4WeightOnlyConfig``); read in torchao 0.18."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from marlin_w4a16.kernels.fp4 import FP4Weight, fp4_weight
from marlin_w4a16.passes.judge.tensors import swizzle, unswizzle
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import NO_VALUES, FoundLinear, bytes_of, factor_of, holds_values, is_linear, is_of


def read(module: nn.Module, recover: bool) -> FoundLinear | Rejected | None:
    """See `marlin_w4a16.producers`."""
    weight: Any = module._parameters.get("weight")
    if not is_of("torchao", weight):
        return None
    if type(weight).__name__ != "NVFP4Tensor":
        return Rejected(f"its weight is a {type(weight).__name__}, expected an NVFP4Tensor")
    if not is_linear(type(module)):
        return Rejected(f"a {type(module).__name__} computes something else than nn.Linear")
    if not holds_values(weight.qdata, weight.scale):
        return NO_VALUES
    n, k = weight.shape
    if weight.qdata.shape != (n, k // 2) or not weight.qdata.is_contiguous():
        return Rejected(f"its codes have shape {tuple(weight.qdata.shape)}, expected rows [{n}, {k // 2}]")
    scales = weight.scale
    if weight.is_swizzled_scales:
        scales = unswizzle(weight.scale, n, k // weight.block_size)
        if not torch.equal(swizzle(scales, weight.scale.shape).view(torch.uint8), weight.scale.view(torch.uint8)):
            return Rejected("its swizzled scales are not padded with zeros")
    factor = 1.0 if weight.per_tensor_scale is None else weight.per_tensor_scale
    names, context = weight.__tensor_flatten__()
    small = {name: getattr(weight, name) for name in names if name not in ("qdata", "scale")}
    kept = {"class": type(weight), "context": context, "small": small, "scales": weight.scale.shape}
    return FoundLinear(
        fp4_weight(weight.qdata.view(torch.uint8), scales, factor),
        weight.orig_dtype,
        bytes_of(weight.qdata, weight.scale),
        kept,
        None if weight.act_quant_kwargs is None else f"its inputs are quantised ({weight.act_quant_kwargs})",
    )


def strip(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """See `marlin_w4a16.producers`."""
    module._parameters["weight"] = None


def fill(module: nn.Module, weight: FP4Weight, kept: Mapping[str, Any]) -> None:
    """See `marlin_w4a16.producers`."""
    context, factor = kept["context"], factor_of(weight)
    scales = weight.scales.view(torch.float8_e4m3fn)
    if context["is_swizzled_scales"]:
        scales = swizzle(scales, kept["scales"])
    inner = {name: value.to(weight.codes.device) for name, value in kept["small"].items()}
    if "per_tensor_scale" in inner:
        inner["per_tensor_scale"] = factor
    elif factor != 1:
        raise ValueError(f"{weight.name}: found a multiplier of {float(factor)}, expected 1: there is no tensor scale")
    inner |= {"qdata": weight.codes, "scale": scales}
    tensor = kept["class"].__tensor_unflatten__(inner, context, (weight.n, weight.k), (weight.k, 1))
    module._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)
