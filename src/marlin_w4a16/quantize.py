"""Quantises the linears of a dense model, in place, into modules that own packed FP4 weights."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import EXACT_EXPONENTS, FP4Weight
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.modules import PackedLinear
from marlin_w4a16.options import Options, unknown
from marlin_w4a16.passes.settings import Settings
from marlin_w4a16.prepare import Origin
from marlin_w4a16.producers.found import NO_VALUES, bytes_of, holds_values, is_linear
from marlin_w4a16.progress import track
from marlin_w4a16.swaps import HOOKS, PACKED, Places, Swap, Swaps, has_hooks, place, places_of
from marlin_w4a16.text import size

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
    """Rounds the weights of a model's linears to FP4, in place: each becomes a `PackedLinear`, activations stay.

    Weights are rounded to nearest from their values alone, on their device, with no calibration. One linear is done at
    a time and its dense weight let go, so that beyond what is packed already there is no more than one dense weight
    and 64 MB; nothing can undo it. Left as they are are linears that compute something else than ``nn.Linear`` or whose
    weight something else needs: it is tied, or read by the code around it.

    Args:
        model: the model; its root itself is not swapped.
        format: ``"nvfp4"`` (groups of 16, E4M3 scales and a global one) or ``"mxfp4"`` (groups of 32, E8M0 scales).
        include: globs; where given, only linears whose path matches one are looked at. The exact path of a linear takes
            it even where it is usually dense, tied (which unties it), or no smaller when it is packed.
        exclude: globs; linears that match one are left alone. None stands for `USUALLY_DENSE`: output heads, routers,
            the vision tower; ``()`` for none.
        progress: see `marlin_w4a16.progress.track`.

    Returns:
        One row per linear, swapped or left with its reason.

    Raises:
        ValueError: an unknown format.
        TypeError: ``include`` or ``exclude`` of another type.
    """
    if format not in _QUANTISERS:
        raise ValueError(unknown("format", format, list(_QUANTISERS)))
    chosen = _Choice(include, exclude)
    linears, shared, rows = _linears(model), _Shared(model), []
    for paths, places in track(linears, f"quantising to {format}", show=progress):
        rows.append(_swap(paths, places, chosen, shared, format))
    return Swaps(tuple(rows))


_QUANTISERS: dict[str, tuple[Callable[..., FP4Weight], int]] = {
    "nvfp4": (quantize_nvfp4, 16),
    "mxfp4": (quantize_mxfp4, 32),
}


class _Choice:
    """What the user chose by paths."""

    def __init__(self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> None:
        options = Options(include=include, exclude=USUALLY_DENSE if exclude is None else exclude)
        self._usual = exclude is None
        self._named = {include} if isinstance(include, str) else set(include or ())
        self._include = Settings(include=options.settings.include)
        self._exclude = Settings(exclude=options.settings.exclude)

    def names(self, paths: list[str]) -> bool:
        """Whether one of a linear's paths is given as it is, not as a glob."""
        return not self._named.isdisjoint((*paths, *(f"{path}.weight" for path in paths)))

    def leaves(self, paths: list[str]) -> str | None:
        """Why a linear with these paths is not to be looked at, or None."""
        weights = [f"{path}.weight" for path in paths]
        missed = [self._include.excluded(weight) for weight in weights]
        if missed[0] is not None and all(missed):
            return missed[0].reason
        hit = next(filter(None, map(self._exclude.excluded, weights)), None)
        if hit is None or (self._usual and self.names(paths)):
            return None
        return f"usually dense: {hit.reason} by default" if self._usual else hit.reason


class _Shared:
    """Which tensors of a model lie in the same memory. Holds addresses only, no tensor."""

    def __init__(self, model: nn.Module) -> None:
        self._spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
        for prefix, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if _is_plain(tensor) and holds_values(tensor):
                    span = *_span(tensor), f"{prefix}.{name}".lstrip(".")
                    self._spans.setdefault(_memory(tensor), []).append(span)

    def others(self, path: str, weight: Tensor) -> list[str]:
        """The paths of other tensors in the memory of a linear's weight."""
        start, stop = _span(weight)
        spans = self._spans[_memory(weight)]
        return [name for first, last, name in spans if first < stop and start < last and name != f"{path}.weight"]


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided  # type: ignore[union-attr]


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of a tensor in its storage and the one past its last, in bytes."""
    if not tensor.numel():
        return 0, 0
    first = int(tensor.storage_offset())
    last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def _linears(model: nn.Module) -> list[tuple[list[str], Places]]:
    """All paths of each linear, and its places; not the linears, whose weights would live on."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            paths.setdefault(id(module), []).append(path)
    places = places_of(model)
    return [(found, places.get(at, [])) for at, found in paths.items()]


def _swap(paths: list[str], places: Places, chosen: _Choice, shared: _Shared, format: Format) -> Swap:
    """Quantises one linear; when this returns, nothing here holds its dense weight."""
    path, left = paths[0], chosen.leaves(paths)
    if left is not None:
        return Swap(path, None, None, left)
    if not places:
        return Swap(path, None, None, "it is the model itself: quantize() swaps the modules in a model")
    (parent, name), *_ = places
    module = parent._modules[name]
    refusal = _refusal(module, places)
    if refusal is not None:
        return Swap(path, None, None, refusal)
    weight: Any = module._parameters["weight"]  # type: ignore[union-attr]
    named, (quantise, group) = chosen.names(paths), _QUANTISERS[format]
    refusal = _weight_refusal(weight, group, named)
    if refusal is not None:
        return Swap(path, None, None, refusal)
    others = shared.others(path, weight)
    if others and not named:
        tied = f"its weight is {' and '.join(others)} too"
        return Swap(path, None, None, f"{tied}: packed, it would be held beside that; {path!r} in include unties it")
    try:
        packed = _packed(module, weight, quantise)
    except ValueError as error:
        return Swap(path, None, None, str(error))
    place(packed, places)
    note = f"untied from {' and '.join(others)}" if others else None
    return Swap(path, None, packed.packed.format, None, 0 if others else bytes_of(weight), packed.packed.nbytes, note)


def _packed(module: Any, weight: Tensor, quantise: Callable[..., FP4Weight]) -> PackedLinear:
    packed = PackedLinear(quantise(weight, name="its weight"), module.bias, weight.dtype).train(module.training)
    gone = "quantize() made it, and let its dense weight go"
    packed.origin = Origin("quantize", None, {}, bytes_of(weight), weight.dtype, weight.device, gone=gone)
    return packed


def _refusal(module: Any, places: Places) -> str | None:
    """Why a module cannot be swapped, whatever its weight is, or None."""
    if isinstance(module, PackedLinear):
        return PACKED.reason
    if not is_linear(type(module)):
        return f"a {type(module).__name__} computes something else than nn.Linear"
    if "weight" not in module._parameters:
        return "its weight is computed, by a parametrisation or a hook"
    if has_hooks(module):
        return HOOKS.reason
    if "forward" in vars(module):
        return "its forward has been replaced"
    more = [*module._parameters, *module._buffers, *module._modules]
    lost = [name for name in more if name not in ("weight", "bias")]
    if lost:
        return f"it also holds {', '.join(lost)}, which a PackedLinear would lose"
    reader = next((found for parent, name in places if (found := _reader(type(parent), name))), None)
    return None if reader is None else f"{reader} reads its weight, which is None in a PackedLinear"


def _weight_refusal(weight: Tensor | None, group: int, named: bool) -> str | None:
    """Why a weight cannot be quantised, values apart, or is not worth it; or None."""
    if weight is None:
        return "it has no weight"
    if type(weight) is not nn.Parameter or not _is_plain(weight):
        return f"its weight is of {type(weight).__name__}, no plain parameter"
    if weight.dtype not in EXACT_EXPONENTS:
        return f"its weight is {weight.dtype}, expected one of {', '.join(map(str, EXACT_EXPONENTS))}"
    if not holds_values(weight):
        return NO_VALUES.reason
    if weight.ndim != 2 or weight.shape[1] % group or not weight.numel():
        return f"its weight is {' x '.join(map(str, weight.shape))}, expected columns in groups of {group}"
    n, k = weight.shape
    before, after = bytes_of(weight), packed_nbytes(n, k, group)
    if after >= before and not named:
        return f"its weight is {n} x {k}, {size(before)}; packed, in whole tiles, it would be {size(after)}"
    return None


def _reader(cls: type[nn.Module], child: str) -> str | None:
    """The method of a class that reads ``self.child.weight``, or None; what only initialises is left out.

    `nn.MultiheadAttention` has one, Bloom and Mamba of transformers too. T5's asks first whether it is a tensor.
    """
    for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method, value in vars(owner).items():
            function: Any = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            code = getattr(function, "__code__", None)
            if code is None or not {child, "weight"} <= set(code.co_names) or "init" in method or "reset" in method:
                continue
            try:
                source = inspect.getsource(function)
            except OSError:  # made at run time
                continue
            read = rf"self\.{re.escape(child)}\.weight\b"
            if re.search(read, source) and not re.search(rf"isinstance\({read}", source):
                return f"{owner.__name__}.{method}"
    return None
