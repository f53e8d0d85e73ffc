"""Which layers of a checkpoint are the experts of which module of a transformers model."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from marlin_w4a16.checkpoints.experts import Mixture, Stack
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer, Problem
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.modules.transformers_experts import gating_of, is_experts, names_of
from marlin_w4a16.passes.outcome import Rejected

_STACKED = ("MergeModulelist", "Concatenate")  # what transformers does to experts that are stacked as they are


@dataclass(frozen=True, slots=True)
class Target:
    """Where transformers would put a tensor.

    Attributes:
        name: of the parameter.
        place: of the tensor among those that are put below each other there.
        places: how many these are.
        operations: names of the classes that change tensors on the way.
    """

    name: str
    place: int = 0
    places: int = 1
    operations: tuple[str, ...] = ()


@dataclass(slots=True)
class _Found:
    """What a checkpoint has for one Experts module: layers by parameter, place in it, and number of the expert."""

    targets: dict[str, Target] = field(default_factory=dict)
    layers: dict[str, dict[int, dict[int, Layer]]] = field(default_factory=dict)


class Experts:
    """Gathers the layers of experts, module by module."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: dict[str, Any] = {path: m for path, m in model.named_modules() if is_experts(m)}
        self._found: dict[str, _Found] = {}

    def take(self, layer: Layer, target: Target) -> bool:
        """Whether a layer belongs to experts; it is remembered then."""
        path, _, name = target.name.rpartition(".")
        if path not in self._modules:
            return False
        found = self._found.setdefault(path, _Found())
        found.targets[name] = target
        found.layers.setdefault(name, {}).setdefault(target.place, {})[_number(layer)] = layer
        return True

    def mixtures(self, others: Mapping[str, Entry]) -> tuple[tuple[Mixture, ...], list[Problem]]:
        """The mixtures that were found, and what is wrong with others.

        Args:
            others: the checkpoint's other tensors, by their names in the model.
        """
        made = [(module := self._modules[path], _mixture(path, module, found)) for path, found in self._found.items()]
        mixtures = tuple(mixture for _, mixture in made if isinstance(mixture, Mixture))
        problems = [problem for _, problem in made if isinstance(problem, Problem)]
        problems += [p for module, m in made if isinstance(m, Mixture) for p in _biases(m, module, others)]
        return mixtures, problems


def gating_on_cpu(module: Any, rows: int) -> tuple[Activation, Order | None] | Rejected:
    """See `gating_of`: while a model is loaded, new tensors are on the meta device and of the model's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            return gating_of(module, rows)
    finally:
        torch.set_default_dtype(before)


def _number(layer: Layer) -> int:
    """Which expert a layer is of: the last number in its path."""
    return 0 if layer.experts else int([part for part in layer.path.split(".") if part.isdigit()][-1])


def _mixture(path: str, module: Any, found: _Found) -> Mixture | Problem:
    stacks: dict[str, tuple[Stack, ...]] = {}
    for name in names_of(module):
        made = list(_stacks(path, module, name, found))
        wrong = next((stack for stack in made if isinstance(stack, Problem)), None)
        if wrong is not None:
            return wrong
        stacks[name] = tuple(stack for stack in made if isinstance(stack, Stack))
    first, second = (stacks[name] for name in names_of(module))
    mixture = Mixture(path, first, second[0])
    return _refused(mixture, module) or mixture


def _stacks(path: str, module: Any, name: str, found: _Found) -> Iterator[Stack | Problem]:
    """The projections that make one parameter of an Experts module."""
    target, places = found.targets.get(name), found.layers.get(name, {})
    if target is None:
        yield Problem(None, f"{path}.{name}", "no such tensor in any file", "experts in FP4, as their others are")
        return
    if odd := [operation for operation in target.operations if operation not in _STACKED]:
        yield Problem(None, f"{path}.{name}", f"experts that transformers changes by {odd[0]}", "experts as they are")
        return
    shape = module._parameters[name].shape
    for place in range(target.places):
        layers = places.get(place, {})
        one = next(iter(layers.values()), None)
        missing = [e for e in range(shape[0]) if e not in layers] if one is None or not one.experts else []
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            found_text = f"no FP4 tensors of expert {missing[0]}{more}"
            yield Problem(None, f"{path}.{name}", found_text, f"those of {shape[0]} experts, as the model has")
        elif surplus := [e for e in layers if e >= shape[0]]:
            file = next(iter(layers[surplus[0]].entries.values())).file.name
            yield Problem(
                file, layers[surplus[0]].path, f"expert {surplus[0]}", f"{shape[0]} experts, as the model has"
            )
        elif odd_one := next((layer for layer in layers.values() if _look(layer) != _look(layers[0])), None):
            yield Problem(_file(odd_one), odd_one.path, _told(odd_one), f"{_told(layers[0])}, as expert 0 has")
        else:
            yield Stack(layers[0].path.rpartition(".")[2], tuple(layers[e] for e in sorted(layers)))


def _biases(mixture: Mixture, module: Any, others: Mapping[str, Entry]) -> Iterator[Problem]:
    """What is wrong with the biases of experts, which transformers loads."""
    for name in names_of(module) if module.has_bias else ():
        bias, shape = f"{mixture.path}.{name}_bias", tuple(module._parameters[f"{name}_bias"].shape)
        found = others.get(bias)
        if found is None:
            yield Problem(None, bias, "no such tensor", f"{list(shape)}, since the model has a bias")
        elif found.shape != shape:
            yield Problem(found.file.name, bias, str(found), f"shape {list(shape)}")


def _look(layer: Layer) -> tuple[Any, ...]:
    entries = {leaf: (entry.dtype, entry.shape) for leaf, entry in layer.entries.items()}
    return layer.storage, layer.n, layer.k, layer.group, entries


def _told(layer: Layer) -> str:
    return f"{layer.format} of {layer.n} x {layer.k} in {', '.join(layer.entries)}"


def _file(layer: Layer) -> str:
    return next(iter(layer.entries.values())).file.name


def _refused(mixture: Mixture, module: Any) -> Problem | None:
    """Why experts cannot run as one op."""
    path, like = mixture.path, mixture.second.like
    file = _file(like)
    for stack in mixture.stacks:
        if not isinstance(stack.like.storage, FP4Storage):
            return Problem(file, path, f"{stack.name} in {stack.like.format}", "experts in FP4")
        scale = stack.storage.part("pre-quant scale")
        if scale is not None and scale.leaf in stack.like.entries:
            return Problem(file, path, f"{scale.leaf} (AWQ) of experts", "none: the input of experts is not scaled")
    formats = {(stack.storage.kind, stack.like.group, stack.like.k) for stack in mixture.first}
    if len(formats) > 1:
        return Problem(file, path, " and ".join(_told(stack.like) for stack in mixture.first), "one format and width")
    shapes = ((mixture.first[0], mixture.rows), (mixture.second, like.n))
    for name, (stack, found) in zip(names_of(module), shapes, strict=True):
        experts, *shape = module._parameters[name].shape
        rows, columns = reversed(shape) if module.is_transposed else shape
        # the columns of the second product may be filled up to whole groups
        filled = -(-columns // like.group) * like.group if stack is mixture.second else columns
        if (stack.experts, found, stack.like.k) != (experts, rows, filled):
            told = f"{stack.experts} experts of {found} x {stack.like.k}"
            return Problem(file, f"{path}.{name}", told, f"{experts} of {rows} x {columns}, as the model has")
    gating = gating_on_cpu(module, mixture.rows)
    if isinstance(gating, Rejected):
        return Problem(file, path, f"experts that do not run as one op: {gating.reason}", "experts that do")
    return None
