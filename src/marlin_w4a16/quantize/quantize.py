"""Quantises the linears and experts of a dense model, in place, into modules that own packed FP4 weights."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.modules.origin import Origin
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.state import held
from marlin_w4a16.modules.swaps import PACKED, Places, Swap, Swaps, place, places_of, untie
from marlin_w4a16.modules.transformers_experts import holds_packed, is_experts, names_of
from marlin_w4a16.options import globs, unknown
from marlin_w4a16.passes.settings import excluded_by, not_included
from marlin_w4a16.producers.found import bytes_of, holds_values
from marlin_w4a16.quantize import experts, linear
from marlin_w4a16.quantize.dense import is_plain
from marlin_w4a16.report.progress import track

Format = Literal["nvfp4", "mxfp4"]
# What ModelOpt's recipes leave dense (default_disabled_quantizers, 0.47); those of llm-compressor leave out heads and
# routers too: few bytes beside the rest, and they suffer most from rounding.
_HEADS = ("*lm_head*", "*output_layer*", "*proj_out", "output")
_ROUTERS = ("*router*", "*mlp.gate", "*block_sparse_moe.gate", "*mlp.shared_expert_gate")
_VISION = ("*vision_tower*", "*vision_model*", "*visual*", "*embed_vision*", "*multi_modal_projector*")
USUALLY_DENSE = (*_HEADS, *_ROUTERS, *_VISION, "*linear_attn.in_proj_a", "*linear_attn.in_proj_b", "mtp.*")


def quantize(
    model: nn.Module,
    format: Format,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> Swaps:
    """Rounds the weights of a model's linears and experts to FP4, in place; activations stay.

    Each linear becomes a `PackedLinear`, and each Experts module of transformers (the stacked weights of a mixture) a
    `PackedExperts`. Weights are rounded to nearest from their values alone, on their device, with no calibration; each
    expert by itself, its gates and its ups apart. One module is done at a time and its dense weights let go, so that
    beyond what is packed there is no more than the dense weights of one and 64 MB; nothing can undo it. Left as they
    are are modules that compute something else, and those whose weights something else needs: they are tied, or read by
    the code around them.

    Args:
        model: the model; its root itself is not swapped.
        format: ``"nvfp4"`` (groups of 16, E4M3 scales and a global one) or ``"mxfp4"`` (groups of 32, E8M0 scales).
        include: globs; where given, only linears and experts whose path matches one are looked at, or all of whose
            weights' paths do. The exact path of one takes it even where it is usually dense, tied (which unties it), or
            no smaller when it is packed.
        exclude: globs; linears and experts that match one are left alone. None stands for `USUALLY_DENSE`: output
            heads, routers, the vision tower; ``()`` for none.
        progress: see `marlin_w4a16.report.progress.track`.

    Returns:
        One row per linear and Experts module, swapped or left with its reason.

    Raises:
        ValueError: an unknown format.
        TypeError: ``include`` or ``exclude`` of another type.
    """
    if format not in _QUANTISERS:
        raise ValueError(unknown("format", format, list(_QUANTISERS)))
    chosen = _Choice(include, exclude)
    found, shared, rows, packed = _found(model), _Shared(model), list[Swap](), list[str]()
    for paths, places in track(found, f"quantising to {format}", show=progress):
        rows.append(_swap(paths, places, model, chosen, shared, format))
        packed += paths if rows[-1].refusal is None else ()
    untie(model, packed)
    return Swaps(tuple(rows))


_QUANTISERS: dict[str, tuple[Callable[..., FP4Weight], int]] = {
    "nvfp4": (quantize_nvfp4, 16),
    "mxfp4": (quantize_mxfp4, 32),
}


class _Choice:
    """What the user chose by paths; a module has one or several, and at each its weights have theirs."""

    def __init__(self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> None:
        self._usual = exclude is None
        self._include = globs("include", include)
        self._exclude = USUALLY_DENSE if exclude is None else globs("exclude", exclude) or ()

    def names(self, paths: list[str], weights: Sequence[str]) -> bool:
        """Whether one of these paths is given as it is, not as a glob."""
        named = {*paths, *(f"{path}.{name}" for path in paths for name in weights)}
        return not named.isdisjoint(self._include or ())

    def leaves(self, paths: list[str], weights: Sequence[str]) -> str | None:
        """Why a module with these paths and weights is not to be looked at, or None."""
        missed = [[not_included(f"{path}.{name}", self._include) for name in weights] for path in paths]
        if all(any(of) for of in missed):
            name, reason = next((name, miss.reason) for name, miss in zip(weights, missed[0], strict=True) if miss)
            return reason if all(missed[0]) else f"{name}: {reason}"
        hits = (excluded_by(f"{path}.{name}", self._exclude) for path in paths for name in weights)
        hit = next(filter(None, hits), None)
        if hit is None or (self._usual and self.names(paths, weights)):
            return None
        return f"usually dense: {hit.reason} by default" if self._usual else hit.reason


class _Shared:
    """Which tensors of a model lie in the same memory. Holds addresses only, no tensor."""

    def __init__(self, model: nn.Module) -> None:
        self._spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
        for prefix, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if is_plain(tensor) and holds_values(tensor):
                    span = *_span(tensor), f"{prefix}.{name}".lstrip(".")
                    self._spans.setdefault(_memory(tensor), []).append(span)

    def others(self, path: str, weight: Tensor) -> list[str]:
        """The paths of other tensors in the memory of the weight at a path."""
        start, stop = _span(weight)
        spans = self._spans[_memory(weight)]
        return [name for first, last, name in spans if first < stop and start < last and name != path]


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of a tensor in its storage and the one past its last, in bytes."""
    if not tensor.numel():
        return 0, 0
    first = int(tensor.storage_offset())
    last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def _found(model: nn.Module) -> list[tuple[list[str], Places]]:
    """All paths of each linear and Experts module, and its places; not the modules, whose weights would live on."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | PackedExperts) or (is_experts(module) and not holds_packed(module)):
            paths.setdefault(id(module), []).append(path)
    places = places_of(model)
    return [(found, places.get(at, [])) for at, found in paths.items()]


def _swap(paths: list[str], places: Places, model: nn.Module, chosen: _Choice, shared: _Shared, format: Format) -> Swap:
    """Quantises one module; when this returns, nothing here holds its dense weights."""
    path, (quantise, group) = paths[0], _QUANTISERS[format]
    module: Any = model.get_submodule(path)
    stacked = not isinstance(module, nn.Linear)
    kind, names = (experts, names_of(module)) if is_experts(module) else (linear, ("weight",))
    named = chosen.names(paths, names)
    refusal = chosen.leaves(paths, names)
    if refusal is None:
        refusal = PACKED.reason if isinstance(module, PackedLinear | PackedExperts) else None
        refusal = refusal if places else "it is the model itself: quantize() swaps the modules in a model"
        refusal = refusal or kind.refusal(module, places, group, named)
    if refusal is not None:
        return Swap(path, None, None, refusal, experts=stacked)
    weights = {name: module._parameters[name] for name in names}
    tied = {name: others for name, weight in weights.items() if (others := shared.others(f"{path}.{name}", weight))}
    if tied and not named:
        name, others = next(iter(tied.items()))
        reason = f"its {name} is {' and '.join(others)} too: packed, it would be held beside that"
        return Swap(path, None, None, f"{reason}; {path!r} in include unties it", experts=stacked)
    try:
        packed = kind.packed(module, quantise, group).train(module.training)
    except ValueError as error:
        return Swap(path, None, None, str(error), experts=stacked)
    dense, first = bytes_of(*weights.values()), weights[names[0]]
    gone = "quantize() made it, and let its dense weight go"
    packed.origin = Origin("quantize", None, {}, dense, first.dtype, first.device, gone=gone)
    place(packed, places)
    before = dense - bytes_of(*(weights[name] for name in tied))
    note = f"untied from {' and '.join(other for others in tied.values() for other in others)}" if tied else None
    found, after = held(packed)
    return Swap(path, None, found, None, before, after, note, experts=stacked)
