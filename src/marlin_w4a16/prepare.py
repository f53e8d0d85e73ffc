"""Swaps the FP4 linears and experts of a loaded model for modules that own their packed weights, and back."""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.modules.origin import Origin
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.state import PackedState, held
from marlin_w4a16.modules.swaps import HOOKS, PACKED, Places, Swap, Swaps, has_hooks, place, places_of, untie
from marlin_w4a16.modules.transformers_experts import biases_of, holds_packed, is_experts, names_of, pack_experts_of
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers import compressed_tensors, modelopt, torchao, torchao_experts
from marlin_w4a16.producers.found import FoundModule, Producer
from marlin_w4a16.report.progress import track

LINEARS: dict[str, Producer] = {"ModelOpt": modelopt, "torchao": torchao, "compressed-tensors": compressed_tensors}
EXPERTS: dict[str, Producer] = {"ModelOpt": modelopt, "torchao": torchao_experts}


def prepare(
    model: nn.Module,
    *,
    recover: bool = False,
    activation_quant: Literal["refuse", "drop"] = "refuse",
    progress: bool | None = None,
) -> Swaps:
    """Swaps the FP4 linears and experts of a model, in place, for packed modules, and frees the original weights.

    Each linear becomes a `PackedLinear`, each Experts module of transformers a `PackedExperts`. Takes linears of NVIDIA
    ModelOpt (``mtq.compress``), torchao (``NVFP4Tensor`` weights) and compressed-tensors (before the first forward,
    which would decompress them), and experts of torchao (``NVFP4Tensor`` parameters). Best done right after loading,
    before torch.compile.

    Args:
        model: the model; its root itself is not swapped.
        recover: also take linears whose weight is dense but was made from FP4: decompressed by compressed-tensors, or
            under a fake quantiser. Their codes are read back with the scales on the module, and taken only if that
            gives every bit of the weight that runs. What a fake quantiser rounds away is gone then: `restore` brings
            back the rounded weight.
        activation_quant: what to do with a module that quantises its input too: ``"refuse"`` it, or ``"drop"`` the
            quantisation: 16-bit activations, other and more exact values.
        progress: see `marlin_w4a16.report.progress.track`.

    Returns:
        One row per linear and Experts module, swapped or refused with its reason: one that raises is left as it was.

    Raises:
        ValueError: an unknown ``activation_quant``.
    """
    if activation_quant not in ("refuse", "drop"):
        raise ValueError(f"prepare: activation_quant: found {activation_quant!r}, expected 'refuse' or 'drop'")
    rows: list[Swap] = []
    places, outside = places_of(model), compressed_tensors.outside(model)
    for path, module in track(list(model.named_modules()), "packing", show=progress):
        producer, found = _read(module, recover)
        if found is None:
            continue
        if id(module) in outside:
            found = _OUTSIDE
        packed = _packed(producer, found, module, activation_quant == "refuse") if path else _ROOT
        rows.append(_swapped(path, producer, module, packed, places.get(id(module), [])))
        del found, packed  # the original weight goes now, one at a time
    untie(model, [path for path, part in model.named_modules(remove_duplicate=False) if isinstance(part, PackedState)])
    for hook in compressed_tensors.hooks_of(model):
        for part in (hook.owner() or model).modules():
            origin = part.origin if isinstance(part, PackedLinear) else None
            if origin is not None and compressed_tensors.is_in("compressed", origin.module):
                origin.hook = hook
    return Swaps(tuple(rows))


def restore(model: nn.Module) -> Swaps:
    """Undoes `prepare`: the original modules come back with their weights, bit for bit.

    A weight that was loaded into a packed module meanwhile is what the original module then holds.

    Returns:
        One row per packed module: restored, or left as it is with the reason.
    """
    rows: list[Swap] = []
    places = places_of(model)
    for path in [name for name, module in model.named_modules() if isinstance(module, PackedState)]:
        packed: Any = model.get_submodule(path)  # no list of modules: each is freed when it has been restored
        origin, (format, nbytes), stacked = packed.origin, held(packed), not isinstance(packed, PackedLinear)
        refusal = _refill(packed, path) if path else "it is the model itself: restore() swaps the modules in a model"
        producer = origin.producer if origin is not None else None
        if refusal is not None or origin is None or origin.module is None:
            rows.append(Swap(path, producer, format, refusal, experts=stacked))
            continue
        place(origin.module, places[id(packed)])
        if origin.hook is not None:
            origin.hook.put_back(origin.module, model)
        rows.append(Swap(path, producer, format, None, nbytes, origin.nbytes, experts=stacked))
    return Swaps(tuple(rows))


_ROOT = Rejected("it is the model itself: prepare() swaps the modules in a model")
_OUTSIDE = Rejected("the hook that decompresses its model is outside of this part: prepare the whole model")


def _read(module: Any, recover: bool) -> tuple[str, FoundModule | Rejected | None]:
    stacked = is_experts(module)
    if isinstance(module, PackedState):
        return "", PACKED
    for name, producer in (EXPERTS if stacked else LINEARS).items():
        try:
            found = producer.read(module, recover)
        except Exception as error:
            found = _raised(error)
        if found is not None:
            return name, found
    if isinstance(module, nn.Linear):
        return "", Rejected(f"its weight is dense {getattr(module.weight, 'dtype', None)}, of no producer of FP4")
    if stacked and not holds_packed(module):
        first = getattr(module, names_of(module)[0], None)
        return "", Rejected(f"its weights are dense {getattr(first, 'dtype', None)}, of no producer of FP4")
    return "", None


def _raised(error: Exception) -> Rejected:
    return Rejected(str(error) if isinstance(error, ValueError) else f"it raises {type(error).__name__}: {error}")


def _producer(origin: Origin) -> Producer:
    return (LINEARS if isinstance(origin.module, nn.Linear) else EXPERTS)[origin.producer]


def _packed(
    producer: str, found: FoundModule | Rejected, module: nn.Module, keeps_activations: bool
) -> PackedLinear | PackedExperts | Rejected:
    if isinstance(found, Rejected):
        return found
    if found.activations is not None and keeps_activations:
        return Rejected(f"{found.activations}: prepare(model, activation_quant='drop') leaves that out")
    try:
        return _packed_as_found(producer, found, module)
    except Exception as error:  # the module is as it was
        return _raised(error)


def _packed_as_found(producer: str, found: FoundModule, module: nn.Module) -> PackedLinear | PackedExperts | Rejected:
    weight, unfitted = found.weights[0], None
    packed: PackedLinear | PackedExperts | Rejected
    if is_experts(module):
        packed = pack_experts_of(module, weight, found.weights[-1], found.dtype)
    elif has_hooks(module):
        packed = HOOKS
    else:
        fitted = weight.fit(found.dtype)
        packed = PackedLinear(pack(fitted), module.bias, found.dtype).train(module.training)  # type: ignore[arg-type]
        unfitted = None if fitted is weight else (weight.scales.clone(), weight.multiplier)
    if not isinstance(packed, Rejected):
        device = weight.codes.device
        packed.origin = Origin(producer, module, found.kept, found.nbytes, found.dtype, device, unfitted)
    return packed


def _swapped(
    path: str, producer: str, module: nn.Module, packed: PackedLinear | PackedExperts | Rejected, places: Places
) -> Swap:
    """Puts what is packed in the place of a module, which is stripped of its weights."""
    stacked = not isinstance(module, nn.Linear)
    if isinstance(packed, Rejected):
        return Swap(path, producer or None, None, packed.reason, experts=stacked)
    origin: Any = packed.origin
    format, after = held(packed)
    place(packed, places)
    _producer(origin).strip(module, origin.kept)
    return Swap(path, producer, format, None, origin.nbytes, after, experts=stacked)


def _refill(packed: PackedLinear | PackedExperts, path: str) -> str | None:
    """Gives the original module its weights back, or says why not."""
    origin = packed.origin
    if origin is None:
        return "prepare() did not make it"
    if origin.module is None:
        return origin.gone
    try:
        weight = packed.to_fp4(path) if isinstance(packed, PackedExperts) else _unfitted(packed.to_fp4(path), origin)
        _producer(origin).fill(origin.module, weight, origin.kept)
    except Exception as error:
        return _raised(error).reason
    biases = {"bias": packed.bias} if isinstance(packed, PackedLinear) else biases_of(packed, origin.module)
    for name, bias in biases.items():
        setattr(origin.module, name, bias)
    origin.module.train(packed.training)
    device = next(packed.parameters()).device
    if device != origin.device:
        origin.module.to(device)
    return None


def _unfitted(weight: FP4Weight, origin: Origin) -> FP4Weight:
    """The weight with the scales it had before packing changed them, if it is still that weight."""
    if origin.unfitted is None:
        return weight
    scales, multiplier = (t.to(weight.codes.device) for t in origin.unfitted)
    before = replace(weight, scales=scales, multiplier=multiplier)
    try:
        again = before.fit(origin.dtype)
    except ValueError:  # they do not belong to the codes of now
        return weight
    same = torch.equal(again.scales, weight.scales) and torch.equal(again.multiplier, weight.multiplier)
    return before if same else weight
