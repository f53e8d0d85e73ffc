"""Quantises the linears and experts of a dense model, in place, into modules that own packed FP4 weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.modules.origin import Origin
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.state import PackedState
from marlin_w4a16.modules.state import held as held_by
from marlin_w4a16.modules.swaps import PACKED, Places, Swap, Swaps, place, places_of, untie
from marlin_w4a16.modules.transformers_experts import holds_packed, is_experts
from marlin_w4a16.modules.transformers_experts import names_of as names_of_experts
from marlin_w4a16.options import unknown
from marlin_w4a16.producers.found import bytes_of
from marlin_w4a16.quantize import experts, groups, linear, others, own_experts
from marlin_w4a16.quantize.choice import Choice
from marlin_w4a16.quantize.product import is_product
from marlin_w4a16.quantize.readers import Readers
from marlin_w4a16.quantize.shared import Shared, look
from marlin_w4a16.report.progress import track

Format = Literal["nvfp4", "mxfp4"]


def quantize(
    model: nn.Module,
    format: Format,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> Swaps:
    """See `marlin_w4a16.quantize`."""
    if format not in _QUANTISERS:
        raise ValueError(unknown("format", format, list(_QUANTISERS)))
    run = _Run(model, Choice(include, exclude), *_QUANTISERS[format])
    found = _found(model)
    for one in found:
        run.judge(one)
    rows = [row for one in track(found, f"quantising to {format}", show=progress) for row in [run.swap(one)]]
    untie(model, [path for one, row in zip(found, rows, strict=True) if row.refusal is None for path in one.paths])
    return Swaps(tuple(rows))


_QUANTISERS: dict[str, tuple[Callable[..., FP4Weight], int]] = {
    "nvfp4": (quantize_nvfp4, 16),
    "mxfp4": (quantize_mxfp4, 32),
}


@dataclass(slots=True)
class _One:
    """One module that owns matrices: what it is, by which file that takes it, and where; not the module itself.

    Attributes:
        paths: all that lead to it.
        places: see `places_of`.
        kind: the file, or None: it is packed already.
        names: of its weights.
        refusal: why it stays as it is, or None.
        named: whether the user named it.
        shares: the others that have its weight, whatever becomes of them, and all that have the packed one.
    """

    paths: list[str]
    places: Places
    kind: ModuleType | None
    names: Sequence[str]
    refusal: str | None = None
    named: bool = False
    shares: "list[_One]" = field(default_factory=list)

    @property
    def path(self) -> str:
        """The first of them."""
        return self.paths[0]

    @property
    def stacked(self) -> bool:
        """Whether it is of several experts."""
        return self.kind in (experts, own_experts, groups) or not (self.names or self.kind)


def _found(model: nn.Module) -> list[_One]:
    """What owns matrices; no modules are held, whose weights would live on."""
    found: dict[int, _One] = {}
    places, inside = places_of(model), set[int]()
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in inside:
            continue
        if isinstance(module, PackedState) or holds_packed(module):
            inside |= {
                id(child) for child in module.modules() if child is not module and not isinstance(child, PackedState)
            }
        if id(module) in found:
            found[id(module)].paths.append(path)
        elif (kind := _kind(module, path)) is not None:
            found[id(module)] = _One([path], places.get(id(module), []), *kind)
    return list(found.values())


def _kind(module: nn.Module, path: str) -> tuple[ModuleType | None, Sequence[str]] | None:
    """The file that takes a module, and the names of its weights; None: it owns no matrix."""
    if isinstance(module, PackedState):
        return None, ("weight",) if isinstance(module, PackedLinear) else ()
    if is_experts(module):
        return None if holds_packed(module) else (experts, names_of_experts(module))
    if isinstance(module, nn.Linear) or is_product(module):
        return linear, ("weight",)
    stacks = own_experts.names_of(module)
    if stacks is not None:
        return own_experts, stacks
    if groups.is_groups(module):
        return groups, ("weight",)
    names = others.names_of(module, path)
    return (others, names) if names else None


class _Run:
    """One call of `quantize`."""

    def __init__(self, model: nn.Module, chosen: Choice, quantise: Callable[..., FP4Weight], group: int) -> None:
        self._model, self._chosen, self._quantise, self._group = model, chosen, quantise, group
        self._shared, self._readers = Shared(model), Readers(model)
        self._alike: dict[tuple[object, ...], list[_One]] = {}
        self._rows: dict[int, Swap] = {}

    def judge(self, one: _One) -> None:
        """Says why a module stays as it is, values apart, and which others have its weight."""
        module: Any = self._model.get_submodule(one.path)
        one.named = self._chosen.names(one.paths, one.names)
        one.refusal = self._chosen.leaves(one.paths, one.names)
        if one.refusal is None and one.kind is None:
            one.refusal = PACKED.reason
        elif one.refusal is None and not one.places:
            one.refusal = "it is the model itself: quantize() swaps the modules in a model"
        elif one.refusal is None and one.kind is not None:
            one.refusal = one.kind.refusal(module, self._readers, self._group, one.named)
        if one.refusal is None and one.kind is linear:
            one.shares = self._alike.setdefault((type(module), *look(module.weight)), [])
            one.shares.append(one)

    def swap(self, one: _One) -> Swap:
        """Quantises one module; when this returns, nothing here holds its dense weights."""
        if id(one) in self._rows:
            return self._rows[id(one)]
        module: Any = self._model.get_submodule(one.path)
        weights = {name: module._parameters[name] for name in one.names} if one.refusal is None else {}
        mates, tied = self._sharing(one, weights)
        if tied and not one.named:
            name, held = next(iter(tied.items()))
            told = f"its {name} is {' and '.join(held)} too: packed, it would be held beside that"
            one.refusal = f"{told}; {one.path!r} in include unties it"
        if one.refusal is not None or one.kind is None:
            return self._left(one)
        try:
            packed = one.kind.packed(module, self._quantise, self._group).train(module.training)
        except ValueError as error:
            one.refusal = str(error)
            return self._left(one)
        dense, first = bytes_of(*weights.values()), weights[one.names[0]]
        gone = "quantize() made it, and let its dense weight go"
        packed.origin = Origin("quantize", None, {}, dense, first.dtype, first.device, gone=gone)
        place(packed, one.places)
        format, after = held_by(packed)
        for mate in mates:
            self._share(packed, mate)
            self._rows[id(mate)] = Swap(mate.path, None, format, None, note=f"shares the packed weight of {one.path}")
        before = dense - bytes_of(*(weights[name] for name in tied))
        note = f"untied from {' and '.join(other for held in tied.values() for other in held)}" if tied else None
        return Swap(one.path, None, format, None, before, after, note, experts=one.stacked)

    def _left(self, one: _One) -> Swap:
        return Swap(one.path, None, None, one.refusal, experts=one.stacked, other=one.kind is others)

    def _sharing(self, one: _One, weights: dict[str, Tensor]) -> tuple[list[_One], dict[str, list[str]]]:
        """Who is to share the packed weight, and the paths of what else lies in the memory of the dense ones."""
        mates = [mate for mate in one.shares if mate is not one and id(mate) not in self._rows]
        inside = {f"{mate.path}.{name}" for mate in mates for name in mate.names}
        tied: dict[str, list[str]] = {}
        for name, weight in weights.items():
            found = self._shared.others(f"{one.path}.{name}", weight)
            if outside := [other for other in found if other not in inside]:
                tied[name] = outside
        return [mate for mate in mates if mate.named or not tied], tied

    def _share(self, packed: PackedLinear, mate: _One) -> None:
        """Puts what is packed in the place of another module with the same weight, with the bias that has."""
        module: Any = self._model.get_submodule(mate.path)
        made = packed
        if module.bias is not packed.bias:
            made = PackedLinear(packed.packed, module.bias, module.weight.dtype).train(module.training)
            made.origin = packed.origin
        place(made, mate.places)
