"""Linears of NVIDIA ModelOpt: compressed by ``mtq.compress``, or fake-quantised (recover); read in ModelOpt 0.47."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import E2M1_MAX, FP4Weight, fp4_weight
from marlin_w4a16.kernels.quantize import nvfp4_scales
from marlin_w4a16.kernels.scale_bytes import E4M3_MAX, ScaleKind, e8m0_of
from marlin_w4a16.modules.transformers_experts import is_experts
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import NO_VALUES, FoundModule, bytes_of, factors_of, holds_values, is_linear, is_of
from marlin_w4a16.producers.recover import dense, found_dense, quantised
from marlin_w4a16.producers.recover import recover as recover_codes

_KINDS: dict[str, ScaleKind] = {"NVFP4QTensor": "e4m3", "MXFP4QTensor": "e8m0"}
_EXPERTS = Rejected("its weights are dense under the quantisers of ModelOpt, which compresses linears only")
_SCALE_BITS: dict[Any, ScaleKind] = {(4, 3): "e4m3", (8, 0): "e8m0"}


def read(module: nn.Module, recover: bool) -> FoundModule | Rejected | None:
    """See `Producer`."""
    if is_experts(module):
        return _EXPERTS if any(is_of("modelopt", child) for child in module.modules() if child is not module) else None
    quantizer: Any = getattr(module, "weight_quantizer", None)
    weight: Any = module._parameters.get("weight")
    if not is_of("modelopt", quantizer) or weight is None or not isinstance(module, nn.Linear):
        return None
    refusal = _refusal(module, quantizer)
    if refusal is not None:
        return Rejected(refusal)
    if not holds_values(weight, *quantizer.buffers()):
        return NO_VALUES
    if type(weight).__name__ == "QTensorWrapper":
        found = _compressed(quantizer, weight)
    else:
        found = _dense(quantizer, weight, recover)
    if isinstance(found, FoundModule) and _is_on(module, "input_quantizer"):
        return replace(found, activations=f"its input quantiser is on ({module.input_quantizer})")
    return found


def strip(module: Any, kept: Mapping[str, Any]) -> None:
    """See `Producer`. ``None`` keeps a parameter's place, so that their order stays."""
    dict.__setitem__(module._parameters, "weight", None)
    if "scale" in kept:
        module.weight_quantizer._buffers["_scale"] = None


def fill(module: Any, weight: FP4Weight, kept: Mapping[str, Any]) -> None:
    """See `Producer`."""
    factor = factors_of(weight)
    if "scale" not in kept:
        value = dense(weight, factor, kept["formula"], kept["dtype"])
        dict.__setitem__(module._parameters, "weight", nn.Parameter(value, requires_grad=kept["requires_grad"]))
        return
    if weight.kind == "e8m0" and factor != 1:
        raise ValueError(f"{weight.name}: found a multiplier of {float(factor)}, expected 1 for ModelOpt's MXFP4")
    shape, dtype = kept["scale"]
    wrapped = kept["class"](weight.codes.reshape(kept["codes"]), metadata=kept["metadata"])
    dict.__setitem__(module._parameters, "weight", wrapped)
    buffers = module.weight_quantizer._buffers
    buffers["_scale"] = weight.scales.view(dtype).reshape(shape)
    if "_double_scale" in buffers:
        buffers["_double_scale"] = factor.reshape(buffers["_double_scale"].shape)


def _refusal(module: Any, quantizer: Any) -> str | None:
    original = module.get_original_cls_by_level(0) if hasattr(module, "get_original_cls_by_level") else type(module)
    if not is_linear(original):
        return f"a {original.__name__} computes something else than nn.Linear"
    if type(quantizer).__name__ != "TensorQuantizer":
        return f"its weight has a {type(quantizer).__name__}, expected one TensorQuantizer"
    if _is_on(module, "output_quantizer"):
        return "its output quantiser is on"
    for name in ("input_quantizer", "weight_quantizer"):
        if getattr(getattr(module, name, None), "pre_quant_scale", None) is not None:
            return f"its {name} has a pre_quant_scale (AWQ), which PackedLinear does not apply"
        if getattr(getattr(module, name, None), "rotate_is_enabled", False):
            return f"its {name} rotates"
    return None


def _is_on(module: nn.Module, name: str) -> bool:
    return bool(getattr(getattr(module, name, None), "is_enabled", False))


def _compressed(quantizer: Any, weight: Any) -> FoundModule | Rejected:
    kind = _KINDS.get(weight.metadata["qtensor_class"].__name__)
    if kind is None:
        return Rejected(f"its weight is a {weight.metadata['qtensor_class'].__name__}, which is not FP4")
    shape, group, scale = weight.metadata["shape"], quantizer.block_sizes[-1], getattr(quantizer, "_scale", None)
    if scale is None:
        return Rejected("its weight quantiser holds no scales")
    if len(shape) != 2 or scale.numel() * group != shape[0] * shape[1]:
        return Rejected(f"its scales have shape {tuple(scale.shape)} for a weight {tuple(shape)} in groups of {group}")
    if shape[1] % group:
        return Rejected(f"its groups of {group} cross the ends of its rows of {shape[1]} columns")
    codes = weight.data.as_subclass(Tensor)
    factor = getattr(quantizer, "_double_scale", None)
    kept = {"class": type(weight), "metadata": weight.metadata, "codes": codes.shape}
    kept["scale"] = scale.shape, scale.dtype
    rows, scales = codes.reshape(shape[0], -1), scale.reshape(shape[0], -1)
    held = fp4_weight(rows, scales, 1.0 if factor is None else factor, kind=kind)
    return FoundModule((held,), weight.metadata["dtype"], bytes_of(codes, scale), kept)


def _dense(quantizer: Any, weight: Tensor, recover: bool) -> FoundModule | Rejected:
    sizes: dict[Any, Any] = quantizer.block_sizes or {}
    kind = _SCALE_BITS.get(sizes.get("scale_bits")) if quantizer.num_bits == (2, 1) else None
    if kind is None or sizes.get("type") != "dynamic" or weight.ndim != 2 or weight.shape[1] % sizes.get(-1, 1 << 62):
        return Rejected("its weight is dense, and its quantiser is not one of dynamic FP4 blocks")
    if kind == "e4m3" and not quantizer.is_enabled and not hasattr(quantizer, "_amax"):
        return Rejected(
            "its weight quantiser is off and holds no scale (mtq.fold_weight keeps it with keep_attrs=True)"
        )
    if not recover:
        first = "mtq.compress(model) packs it" if quantizer.is_enabled else "its weight quantiser is off"
        return Rejected(
            f"its weight is dense: {first}, prepare(model, recover=True) reads codes back where there are any"
        )
    factor = torch.ones((), device=weight.device)
    if kind == "e4m3":
        amax = getattr(quantizer, "_amax", None)
        if amax is None or amax.numel() != 1:
            return Rejected("its weight quantiser holds no amax of the whole weight: calibrate it first")
        factor = amax.float().reshape(()) / (E2M1_MAX * E4M3_MAX)
    value = weight.detach()
    if quantizer.is_enabled:
        try:
            made = quantised(lambda dense: quantizer(dense).detach(), weight)
        except Exception as error:
            return Rejected(f"its fake quantiser does not run here: {type(error).__name__}: {error}")
        if isinstance(made, Rejected):
            return made
        value = made
    # A block's largest value is six scales, and tells the scale unless that is subnormal. The weight tells it too, but
    # the quantiser's kernel divides approximately, and may round to the neighbour.
    scales = [_scales(source, kind, sizes[-1], factor) for source in (value, weight.detach())]
    return found_dense(weight, recover_codes(value, scales, factor, kind))


def _scales(weight: Tensor, kind: ScaleKind, group: int, factor: Tensor) -> Tensor:
    """The scales ModelOpt gives the blocks of a weight."""
    blocks = weight.reshape(weight.shape[0], -1, group)
    if kind == "e4m3":
        return nvfp4_scales(blocks, factor)
    return e8m0_of(torch.log2(blocks.float().abs().amax(-1) / E2M1_MAX).ceil())
