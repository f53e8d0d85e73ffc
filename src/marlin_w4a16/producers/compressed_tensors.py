"""Linears of compressed-tensors: compressed, or dense with their scales beside (recover); read in version 0.20."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight, fp4_weight
from marlin_w4a16.kernels.scale_bytes import ScaleKind, first_nan, scale_bytes
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import NO_VALUES, FoundModule, bytes_of, factors_of, holds_values, is_linear, is_of
from marlin_w4a16.producers.recover import dense, found_dense, quantised
from marlin_w4a16.producers.recover import recover as recover_codes

_KINDS: dict[int, ScaleKind] = {16: "e4m3", 32: "e8m0"}


def read(module: Any, recover: bool) -> FoundModule | Rejected | None:
    """See `Producer`."""
    scheme: Any = getattr(module, "quantization_scheme", None)
    if not is_of("compressed_tensors", scheme) or not issubclass(type(module), nn.Linear):
        return None
    refusal = _refusal(module, scheme)
    if refusal is not None:
        return Rejected(refusal)
    if not holds_values(*_parameters(module).values()):
        return NO_VALUES
    status = str(module.quantization_status.value)
    needed = ("weight_packed" if status == "compressed" else "weight", "weight_scale")
    held = [name for name, value in _parameters(module).items() if value is not None]
    if not set(needed) <= set(held):
        found: FoundModule | Rejected = Rejected(
            f"a linear that is {status} holds {', '.join(held)}: expected {' and '.join(needed)}"
        )
    elif status == "compressed":
        found = _compressed(module, scheme)
    elif recover:
        found = _dense(module, scheme, status)
    else:
        found = Rejected(f"its weight is dense ({status}): prepare(model, recover=True) reads the codes back")
    args = scheme.input_activations
    if isinstance(found, FoundModule) and args is not None:
        return replace(found, activations=f"its inputs are quantised to {args.num_bits} bit {args.type}")
    return found


def strip(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """See `Producer`. ``None`` keeps a parameter's place, so that their order stays."""
    for name in kept["names"]:
        _parameters(module)[name] = None


def fill(module: nn.Module, weight: FP4Weight, kept: Mapping[str, Any]) -> None:
    """See `Producer`."""
    parameters = _parameters(module)
    factor = _set_divisor(parameters, weight)
    values: tuple[Tensor, ...]
    if "formula" in kept:
        values = (dense(weight, factor, kept["formula"], kept["dtype"]),)
    else:
        values = (weight.codes, weight.scales.view(kept["scale"]))
    for name, value in zip(kept["names"], values, strict=True):
        parameters[name] = nn.Parameter(value, requires_grad=kept.get("requires_grad", False))


@dataclass(frozen=True, slots=True)
class Hook:
    """What decompresses a model at its first forward, and that model, or None; a copy belongs to that of the model."""

    owner: Callable[[], nn.Module | None]
    call: Callable[..., Any]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        owner = memo.get(id(self.owner()))  # None where only a part of its model is copied
        return replace(self, owner=weakref.ref(owner) if owner is not None else lambda: None)

    def put_back(self, module: nn.Module, model: nn.Module) -> None:
        """Hangs it where it was, or on ``model`` if that is gone; if it ran meanwhile, decompresses ``module``."""
        owner: Any = self.owner() or model
        if hasattr(owner, "ct_decompress_hook"):
            return
        if any(is_in("decompressed", part) for part in owner.modules()):
            from compressed_tensors.compressors.base import decompress_module

            decompress_module(module)
        else:
            owner.ct_decompress_hook = owner.register_forward_pre_hook(self.call)


def hooks_of(model: nn.Module) -> Iterator[Hook]:
    """The hooks that decompress a model or parts of it; those with nothing left to decompress are taken off."""
    for owner in model.modules():
        handle = getattr(owner, "ct_decompress_hook", None)
        if handle is None:
            continue
        yield Hook(weakref.ref(owner), owner._forward_pre_hooks[handle.id])
        if not any(is_in("compressed", part) for part in owner.modules()):
            handle.remove()
            del owner.ct_decompress_hook


def outside(model: nn.Module) -> set[int]:
    """The ids of compressed linears whose model's hook is not in ``model``: it would run unseen."""
    compressed = {id(module) for module in model.modules() if is_in("compressed", module)}
    owners = [module for module in model.modules() if hasattr(module, "ct_decompress_hook")]
    return compressed - {id(part) for owner in owners for part in owner.modules()}


def is_in(status: str, module: nn.Module | None) -> bool:
    """Whether compressed-tensors holds a module in a status."""
    return getattr(module, "quantization_status", None) == status


def _parameters(module: nn.Module) -> dict[str, Any]:
    """The parameters of a module, behind the cache that compressed-tensors puts before them when it decompresses."""
    parameters: dict[str, Any] = getattr(module._parameters, "offloaded_values", module._parameters)
    return parameters


def _refusal(module: nn.Module, scheme: Any) -> str | None:
    args = scheme.weights
    if args is None or args.num_bits != 4 or args.type != "float" or args.group_size not in _KINDS:
        return f"its scheme is not FP4: {args}"
    if not is_linear(type(module)):
        return f"a {type(module).__name__} computes something else than nn.Linear"
    if scheme.output_activations is not None:
        return "its outputs are quantised"
    if not getattr(module, "quantization_enabled", True):
        return "its quantisation is switched off"
    cache: Any = module._parameters
    if hasattr(cache, "offloaded_values") and torch.device(cache.onload_device) != torch.device(cache.offload_device):
        return f"its weights are offloaded to {cache.offload_device}"
    return None


def _compressed(module: nn.Module, scheme: Any) -> FoundModule:
    parameters = _parameters(module)
    codes, scales = parameters["weight_packed"].detach(), parameters["weight_scale"].detach()
    kind = _KINDS[scheme.weights.group_size]
    divisor = parameters.get("weight_global_scale")
    factor = 1.0 if divisor is None else divisor.detach().float().reciprocal()
    kept = {"names": ("weight_packed", "weight_scale"), "scale": scales.dtype}
    weight = fp4_weight(codes, scales, factor, kind=kind)
    # compressed-tensors decompresses to bfloat16, whatever the model's dtype
    return FoundModule((weight,), torch.bfloat16, bytes_of(codes, scales), kept)


def _dense(module: nn.Module, scheme: Any, status: str) -> FoundModule | Rejected:
    parameters = _parameters(module)
    weight, scale = parameters["weight"].detach(), parameters["weight_scale"].detach()
    group = scheme.weights.group_size
    scales = scale_bytes(scale, _KINDS[group])
    if first_nan(scales, _KINDS[group]) is not None or scale.ndim != 2 or scale.shape[1] * group != weight.shape[1]:
        return Rejected(f"its scales {tuple(scale.shape)} of {scale.dtype} are no FP4 scales in groups of {group}")
    value = weight
    if status != "decompressed":
        from compressed_tensors.quantization.lifecycle.forward import forward_quantize

        made = quantised(lambda dense: forward_quantize(module, dense, "weight", scheme.weights), weight)
        if isinstance(made, Rejected):
            return made
        value = made
    divisor = parameters.get("weight_global_scale")
    factor = torch.ones((), device=weight.device) if divisor is None else divisor.detach().float().reshape(())
    recovered = recover_codes(value, [scales], factor, _KINDS[group], divides=divisor is not None)
    return found_dense(parameters["weight"], recovered, names=("weight",))


def _set_divisor(parameters: dict[str, Any], weight: FP4Weight) -> Tensor:
    """Sets the global scale to that of the weight; returns it as a divisor, or 1 where the format has none."""
    factor, divisor = factors_of(weight), parameters.get("weight_global_scale")
    if divisor is None:
        if factor != 1:
            raise ValueError(
                f"{weight.name}: found a multiplier of {float(factor)}, expected 1: there is no global scale"
            )
        return factor
    value: Tensor = divisor.detach().float().to(factor.device)
    if not bool((value.reciprocal() == factor).all()):
        value = factor.reciprocal().expand_as(value).clone()
    parameters["weight_global_scale"] = nn.Parameter(value.to(divisor.dtype), requires_grad=False)
    return value.reshape(())
