"""Swaps the FP4 linears of a loaded model for modules that own their packed weights, and back."""

import copy
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.modules import PackedLinear
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers import compressed_tensors, modelopt, torchao
from marlin_w4a16.producers.found import Found
from marlin_w4a16.progress import track
from marlin_w4a16.swaps import HOOKS, PACKED, Swap, Swaps, has_hooks, place, places_of

PRODUCERS = {"ModelOpt": modelopt, "torchao": torchao, "compressed-tensors": compressed_tensors}


@dataclass(slots=True)
class Origin:
    """What `restore` needs: the module that was swapped, without its weight; or why that is gone.

    Attributes:
        producer: who made it.
        module: the module.
        kept: see `marlin_w4a16.producers.found.Found`.
        nbytes: bytes of its weight.
        dtype: what its producer decodes it to.
        device: where it was.
        unfitted: scales and multiplier as they were, where packing changed them (see `FP4Weight.fit`).
        hook: what decompresses it.
        gone: why there is no module.
    """

    producer: str
    module: nn.Module | None
    kept: Mapping[str, Any]
    nbytes: int
    dtype: torch.dtype
    device: torch.device
    unfitted: tuple[Tensor, Tensor] | None = None
    hook: compressed_tensors.Hook | None = None
    gone: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        try:
            module, hook = copy.deepcopy(self.module, memo), self.hook
        except Exception as error:  # modules of ModelOpt 0.47 cannot be copied
            return self._without(f"the original module could not be copied: {type(error).__name__}: {error}")
        if hook is not None:
            owner = memo.get(id(hook.owner()))  # None where only a part of its model is copied
            hook = replace(hook, owner=weakref.ref(owner) if owner is not None else lambda: None)
        return replace(self, module=module, hook=hook)

    def __reduce__(self) -> tuple[Any, ...]:
        gone = self._without("the original module is not saved with a PackedLinear")
        return Origin, tuple(getattr(gone, f.name) for f in fields(gone))

    def _without(self, reason: str) -> "Origin":
        return Origin(self.producer, None, {}, self.nbytes, self.dtype, self.device, gone=self.gone or reason)


def prepare(
    model: nn.Module,
    *,
    recover: bool = False,
    activation_quant: Literal["refuse", "drop"] = "refuse",
    progress: bool | None = None,
) -> Swaps:
    """Swaps the FP4 linears of a model, in place, for `PackedLinear` modules, and frees the original weights.

    Takes linears of NVIDIA ModelOpt (``mtq.compress``), torchao (``NVFP4Tensor`` weights) and compressed-tensors
    (before the first forward, which would decompress them). Best done right after loading, before torch.compile.

    Args:
        model: the model; its root itself is not swapped.
        recover: also take linears whose weight is dense but was made from FP4: decompressed by compressed-tensors, or
            under a fake quantiser. Their codes are read back with the scales on the module, and taken only if that
            gives every bit of the weight that runs. What a fake quantiser rounds away is gone then: `restore` brings
            back the rounded weight.
        activation_quant: what to do with a linear that quantises its input too: ``"refuse"`` it, or ``"drop"`` the
            quantisation: 16-bit activations, other and more exact values.
        progress: see `marlin_w4a16.progress.track`.

    Returns:
        One row per linear, swapped or refused with its reason.

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
            found = Rejected("the hook that decompresses its model is outside of this part: prepare the whole model")
        packed = _packed(producer, found, module, activation_quant == "refuse") if path else _ROOT
        if isinstance(packed, PackedLinear):
            PRODUCERS[packed.origin.producer].strip(module, packed.origin.kept)
            place(packed, places[id(module)])
            rows.append(Swap(path, producer, packed.packed.format, None, packed.origin.nbytes, packed.packed.nbytes))
        else:
            rows.append(Swap(path, producer or None, None, packed.reason))
        del found  # the original weight goes now, one at a time
    for hook in compressed_tensors.hooks_of(model):
        for part in (hook.owner() or model).modules():
            origin = part.origin if isinstance(part, PackedLinear) else None
            if isinstance(origin, Origin) and compressed_tensors.is_in("compressed", origin.module):
                origin.hook = hook
    return Swaps(tuple(rows))


def restore(model: nn.Module) -> Swaps:
    """Undoes `prepare`: the original modules come back with their weights, bit for bit.

    A weight that was loaded into a `PackedLinear` meanwhile is what the original module then holds.

    Returns:
        One row per `PackedLinear`: restored, or left as it is with the reason.
    """
    rows: list[Swap] = []
    places = places_of(model)
    for path in [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]:
        packed: Any = model.get_submodule(path)  # no list of modules: each is freed when it has been restored
        origin, packing = packed.origin, packed.packed
        refusal = _refill(packed, path) if path else "it is the model itself: restore() swaps the modules in a model"
        producer = origin.producer if isinstance(origin, Origin) else None
        if refusal is not None or not isinstance(origin, Origin) or origin.module is None:
            rows.append(Swap(path, producer, packing.format, refusal))
            continue
        place(origin.module, places[id(packed)])
        if origin.hook is not None:
            origin.hook.put_back(origin.module, model)
        rows.append(Swap(path, producer, packing.format, None, packing.nbytes, origin.nbytes))
    return Swaps(tuple(rows))


_ROOT = Rejected("it is the model itself: prepare() swaps the modules in a model")


def _read(module: nn.Module, recover: bool) -> tuple[str, Found | Rejected | None]:
    if isinstance(module, PackedLinear):
        return "", PACKED
    for name, producer in PRODUCERS.items():
        try:
            found = producer.read(module, recover)
        except ValueError as error:
            found = Rejected(str(error))
        if found is not None:
            return name, found
    if isinstance(module, nn.Linear):
        return "", Rejected(f"its weight is dense {getattr(module.weight, 'dtype', None)}, of no producer of FP4")
    return "", None


def _packed(
    producer: str, found: Found | Rejected, module: nn.Module, keeps_activations: bool
) -> PackedLinear | Rejected:
    if isinstance(found, Rejected):
        return found
    if found.activations is not None and keeps_activations:
        return Rejected(f"{found.activations}: prepare(model, activation_quant='drop') leaves that out")
    if has_hooks(module):
        return HOOKS
    try:
        weight = found.weight.fit(found.dtype)
    except ValueError as error:
        return Rejected(str(error))
    packed = PackedLinear(pack(weight), module.bias).train(module.training)  # type: ignore[arg-type]
    unfitted = None
    if weight is not found.weight:
        unfitted = found.weight.scales.clone(), found.weight.multiplier
    packed.origin = Origin(producer, module, found.kept, found.nbytes, found.dtype, weight.codes.device, unfitted)
    return packed


def _refill(packed: PackedLinear, path: str) -> str | None:
    """Gives the original module its weight back, or says why not."""
    origin = packed.origin
    if not isinstance(origin, Origin):
        return "prepare() did not make it"
    if origin.module is None:
        return origin.gone
    try:
        PRODUCERS[origin.producer].fill(origin.module, _unfitted(packed.to_fp4(path), origin), origin.kept)
    except ValueError as error:
        return str(error)
    origin.module.bias = packed.bias
    origin.module.train(packed.training)
    if packed.words.device != origin.device:
        origin.module.to(packed.words.device)
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
