"""Linears whose weight torchao made an ``NVFP4Tensor`` (``NVFP4WeightOnlyConfig``); read in torchao 0.18."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight, as_bytes, fp4_weight
from marlin_w4a16.kernels.scale_bytes import swizzle, unswizzle
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import NO_VALUES, FoundModule, bytes_of, factors_of, holds_values, is_linear, is_of


def read(module: nn.Module, recover: bool) -> FoundModule | Rejected | None:
    """See `Producer`."""
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
    found = weight_of(weight, "weight")
    if isinstance(found, Rejected):
        return found
    return found_of((weight,), (found,), kept_of(weight))


def strip(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """See `Producer`."""
    module._parameters["weight"] = None


def fill(module: nn.Module, weight: FP4Weight, kept: Mapping[str, Any]) -> None:
    """See `Producer`."""
    factor, scaled = factors_of(weight), "per_tensor_scale" in kept["small"]
    if not scaled and factor != 1:
        raise ValueError(f"{weight.name}: found a multiplier of {float(factor)}, expected 1: there is no tensor scale")
    tensor = tensor_of(weight, factor if scaled else None, kept)
    module._parameters["weight"] = nn.Parameter(tensor, requires_grad=False)


def weight_of(tensor: Any, name: str) -> FP4Weight | Rejected:
    """The weight of an ``NVFP4Tensor`` ``[..., n, k]`` whose codes lie in rows."""
    *rows, k = tensor.shape
    scales, factor = tensor.scale, 1.0 if tensor.per_tensor_scale is None else tensor.per_tensor_scale
    if tensor.is_swizzled_scales:
        columns = k // tensor.block_size
        scales = unswizzle(tensor.scale, math.prod(rows), columns)
        if not torch.equal(as_bytes(swizzle(scales, tensor.scale.shape)), as_bytes(tensor.scale)):
            return Rejected("its swizzled scales are not padded with zeros")
        scales = scales.view(*rows, columns)
    if len(rows) > 1 and isinstance(factor, Tensor) and factor.numel() > 1:  # one for each matrix
        factor = factor.reshape(-1, 1).expand(rows)
    return fp4_weight(as_bytes(tensor.qdata), scales, factor, name=name)


def found_of(tensors: Sequence[Any], weights: tuple[FP4Weight, ...], kept: Mapping[str, Any]) -> FoundModule:
    """What a module holds whose weights were some ``NVFP4Tensor``s."""
    nbytes = bytes_of(*(part for tensor in tensors for part in (tensor.qdata, tensor.scale)))
    quantised = next((tensor.act_quant_kwargs for tensor in tensors if tensor.act_quant_kwargs is not None), None)
    activations = None if quantised is None else f"its inputs are quantised ({quantised})"
    return FoundModule(weights, tensors[0].orig_dtype, nbytes, kept, activations)


def kept_of(tensor: Any) -> dict[str, Any]:
    """What `tensor_of` needs of an ``NVFP4Tensor`` beside its weight."""
    names, context = tensor.__tensor_flatten__()
    small = {name: getattr(tensor, name) for name in names if name not in ("qdata", "scale")}
    return {"class": type(tensor), "context": context, "small": small, "scales": tensor.scale.shape}


def tensor_of(weight: FP4Weight, factor: Tensor | None, kept: Mapping[str, Any]) -> Tensor:
    """The inverse of `weight_of`; ``factor`` is the scale of the tensor, if it has one."""
    scales = weight.scales.view(torch.float8_e4m3fn)
    if kept["context"]["is_swizzled_scales"]:
        scales = swizzle(scales.flatten(0, -2), kept["scales"])
    inner = {name: value.to(weight.codes.device) for name, value in kept["small"].items()}
    inner |= {"qdata": weight.codes, "scale": scales} | ({} if factor is None else {"per_tensor_scale": factor})
    shape = torch.Size((*weight.codes.shape[:-1], weight.k))
    made: Tensor = kept["class"].__tensor_unflatten__(inner, kept["context"], shape, None)
    return made
