"""Swaps the FP4 linears of a loaded model for modules that own their packed weights, and back."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.modules import PackedLinear
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers import compressed_tensors, modelopt, torchao
from marlin_w4a16.producers.found import Found
from marlin_w4a16.report import size, table

PRODUCERS = {"ModelOpt": modelopt, "torchao": torchao, "compressed-tensors": compressed_tensors}


@dataclass(frozen=True, slots=True)
class Swap:
    """One linear of the model: swapped, or left as it was and why.

    Attributes:
        path: its module path.
        producer: who made it, or None.
        format: such as ``"NVFP4 group 16"``, or None.
        refusal: why it was left, or None.
        before, after: bytes of its weight.
    """

    path: str
    producer: str | None
    format: str | None
    refusal: str | None
    before: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class Swaps:
    """What `prepare` or `restore` did, one row per linear; ``print`` it for a table."""

    rows: tuple[Swap, ...]

    @property
    def done(self) -> tuple[Swap, ...]:
        """The linears that were swapped."""
        return tuple(row for row in self.rows if row.refusal is None)

    @property
    def refused(self) -> tuple[Swap, ...]:
        """The linears that were left as they were."""
        return tuple(row for row in self.rows if row.refusal is not None)

    def __str__(self) -> str:
        before, after = sum(row.before for row in self.done), sum(row.after for row in self.done)
        total = f"swapped {len(self.done)} of {len(self.rows)} linears: {size(before)} -> {size(after)}"
        return f"{table([_COLUMNS, *map(_cells, self.rows)])}\n{total}"


@dataclass(slots=True)
class Origin:
    """What `restore` needs: the module that was swapped, without its weight; or why that is gone."""

    producer: str
    module: nn.Module | None
    kept: Mapping[str, Any]
    nbytes: int
    device: torch.device
    hook: Callable[..., Any] | None = None
    gone: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        try:
            module = copy.deepcopy(self.module, memo)
        except Exception as error:  # modules of ModelOpt 0.47 cannot be copied
            gone = f"the original module could not be copied: {type(error).__name__}: {error}"
            return Origin(self.producer, None, {}, self.nbytes, self.device, None, gone)
        return Origin(self.producer, module, self.kept, self.nbytes, self.device, self.hook, self.gone)

    def __reduce__(self) -> tuple[Any, ...]:
        gone = self.gone or "the original module is not saved with a PackedLinear"
        return Origin, (self.producer, None, {}, self.nbytes, self.device, None, gone)


def prepare(
    model: nn.Module, *, recover: bool = False, activation_quant: Literal["refuse", "drop"] = "refuse"
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

    Returns:
        One row per linear, swapped or refused with its reason.

    Raises:
        ValueError: an unknown ``activation_quant``.
    """
    if activation_quant not in ("refuse", "drop"):
        raise ValueError(f"prepare: activation_quant: found {activation_quant!r}, expected 'refuse' or 'drop'")
    rows: list[Swap] = []
    places = _places(model)
    for path, module in list(model.named_modules()):
        producer, found = _read(module, recover)
        if found is None:
            continue
        packed = _packed(found, module, keeps_activations=activation_quant == "refuse") if path else _ROOT
        if isinstance(packed, PackedLinear) and isinstance(found, Found) and producer is not None:
            PRODUCERS[producer].strip(module, found.kept)
            packed.origin = Origin(producer, module, found.kept, found.nbytes, packed.words.device)
            _place(packed, places[id(module)])
            rows.append(Swap(path, producer, packed.packed.format, None, found.nbytes, packed.packed.nbytes))
        elif isinstance(packed, Rejected):
            rows.append(Swap(path, producer, None, packed.reason))
        del found  # the originals go now, one at a time
    for owner, hook in compressed_tensors.take_hooks(model):
        for part in owner.modules():
            if isinstance(part, PackedLinear) and isinstance(part.origin, Origin):
                part.origin.hook = hook
    return Swaps(tuple(rows))


def restore(model: nn.Module) -> Swaps:
    """Undoes `prepare`: the original modules come back with their weights, bit for bit.

    A weight that was loaded into a `PackedLinear` meanwhile is what the original module then holds.

    Returns:
        One row per `PackedLinear`: restored, or left as it is with the reason.
    """
    rows: list[Swap] = []
    places = _places(model)
    for path, packed in list(model.named_modules()):
        if not isinstance(packed, PackedLinear):
            continue
        origin, name = packed.origin, packed.packed.format
        refusal = _refill(packed, path)
        if refusal is not None or not isinstance(origin, Origin) or origin.module is None:
            rows.append(Swap(path, getattr(origin, "producer", None), name, refusal))
            continue
        _place(origin.module, places[id(packed)])
        if origin.hook is not None:
            compressed_tensors.hang(model, origin.hook)
        rows.append(Swap(path, origin.producer, name, None, packed.packed.nbytes, origin.nbytes))
    return Swaps(tuple(rows))


_COLUMNS = ("linear", "producer", "format", "bytes", "outcome")
_ROOT = Rejected("it is the model itself: prepare() swaps the modules in a model")


def _cells(row: Swap) -> tuple[str, ...]:
    change = f"{size(row.before)} -> {size(row.after)}" if row.refusal is None else "-"
    return row.path, row.producer or "-", row.format or "-", change, row.refusal or "swapped"


def _read(module: nn.Module, recover: bool) -> tuple[str | None, Found | Rejected | None]:
    if isinstance(module, PackedLinear):
        return None, Rejected("it is packed already")
    for name, producer in PRODUCERS.items():
        try:
            found = producer.read(module, recover)
        except ValueError as error:
            found = Rejected(str(error))
        if found is not None:
            return name, found
    if isinstance(module, nn.Linear):
        return None, Rejected(f"its weight is dense {module.weight.dtype}, of no producer of FP4")
    return None, None


def _packed(found: Found | Rejected, module: nn.Module, keeps_activations: bool) -> PackedLinear | Rejected:
    if isinstance(found, Rejected):
        return found
    if found.activations is not None and keeps_activations:
        return Rejected(f"{found.activations}: prepare(model, activation_quant='drop') leaves that out")
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or hasattr(module, "_hf_hook"):
        return Rejected("it has hooks, which a PackedLinear would lose")
    if found.weight.codes.is_meta:
        return Rejected("its weight holds no values: it is on the meta device")
    try:
        packed = PackedLinear(pack(found.weight.fit(found.dtype)), module.bias)  # type: ignore[arg-type]
    except ValueError as error:
        return Rejected(str(error))
    return packed.train(module.training)


def _refill(packed: PackedLinear, path: str) -> str | None:
    """Gives the original module its weight back, or says why not."""
    origin = packed.origin
    if not isinstance(origin, Origin):
        return "prepare() did not make it"
    if origin.module is None:
        return origin.gone
    try:
        PRODUCERS[origin.producer].fill(origin.module, packed.to_fp4(path), origin.kept)
    except ValueError as error:
        return str(error)
    origin.module.bias = packed.bias  # type: ignore[assignment]
    origin.module.train(packed.training)
    if packed.words.device != origin.device:
        origin.module.to(packed.words.device)
    return None


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module stands: its parents, and its name in each."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            places.setdefault(id(child), []).append((parent, name))
    return places


def _place(module: nn.Module, places: list[tuple[nn.Module, str]]) -> None:
    for parent, name in places:
        parent._modules[name] = module
