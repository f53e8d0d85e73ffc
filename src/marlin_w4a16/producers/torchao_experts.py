"""Experts whose stacked weights are an ``NVFP4Tensor`` of torchao, ``[experts, n, k]``; read in torchao 0.18.

``quantize_`` makes them where FqnToConfig names the parameters and the config quantises inputs too
(``NVFP4DynamicActivationNVFP4WeightConfig``); its weight-only config takes linears only, yet experts whose parameters
were set by hand run with ``experts_implementation="eager"``. Where a module holds its weights transposed, so are these.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.transformers_experts import names_of
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import NO_VALUES, FoundModule, factors_of, holds_values, is_of
from marlin_w4a16.producers.torchao import found_of, kept_of, tensor_of, weight_of


def read(module: Any, recover: bool) -> FoundModule | Rejected | None:
    """See `Producer`."""
    names = names_of(module)
    held = [module._parameters.get(name) for name in names]
    if not any(is_of("torchao", tensor) for tensor in held):
        return None
    for name, tensor in zip(names, held, strict=True):
        if type(tensor).__name__ != "NVFP4Tensor":
            return Rejected(f"its {name} is a {type(tensor).__name__}, expected an NVFP4Tensor")
        if not holds_values(tensor.qdata, tensor.scale):
            return NO_VALUES
    tensors = [tensor.detach().mT if module.is_transposed else tensor.detach() for tensor in held]
    weights: tuple[FP4Weight, ...] = ()
    for name, tensor in zip(names, tensors, strict=True):
        weight = _weight(f"its {name}", tensor)
        if isinstance(weight, Rejected):
            return weight
        weights += (weight,)
    return found_of(tensors, weights, dict(zip(names, map(kept_of, tensors), strict=True)))


def strip(module: nn.Module, kept: Mapping[str, Any]) -> None:
    """See `Producer`."""
    for name in kept:
        module._parameters[name] = None


def fill(module: Any, weights: tuple[FP4Weight, FP4Weight], kept: Mapping[str, Any]) -> None:
    """See `Producer`."""
    made = [_tensor(weight, of) for weight, of in zip(weights, kept.values(), strict=True)]
    for name, tensor in zip(kept, made, strict=True):
        module._parameters[name] = nn.Parameter(tensor.mT if module.is_transposed else tensor, requires_grad=False)


def _weight(name: str, tensor: Any) -> FP4Weight | Rejected:
    experts, n, k = tensor.shape if tensor.ndim == 3 else (0, 0, 0)
    if not experts or tensor.qdata.shape != (experts, n, k // 2) or not tensor.qdata.is_contiguous():
        return Rejected(f"{name}: its codes do not lie in rows of what a product sums over, [experts, n, k / 2]")
    found = weight_of(tensor, name)
    return Rejected(f"{name}: {found.reason}") if isinstance(found, Rejected) else found


def _tensor(weight: FP4Weight, kept: Mapping[str, Any]) -> Tensor:
    factors, scale = factors_of(weight), kept["small"].get("per_tensor_scale")
    if scale is not None and scale.ndim:
        return tensor_of(weight, factors.view(scale.shape), kept)
    if bool((factors != factors[0]).any()):
        raise ValueError(f"{weight.name}: found a multiplier per expert, expected one for all")
    if scale is None and factors[0] != 1:
        raise ValueError(f"{weight.name}: found a multiplier of {float(factors[0])}, expected 1: there is no scale")
    return tensor_of(weight, None if scale is None else factors[0].clone(), kept)
