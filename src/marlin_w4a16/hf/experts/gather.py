"""Which layers of a checkpoint are the experts of which module of a transformers model."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from marlin_w4a16.checkpoints.experts import Stack, StoredMixture
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer, Problem
from marlin_w4a16.checkpoints.storage import LOW_RANK, FP4Storage
from marlin_w4a16.hf.experts.batched import as_experts
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.modules.transformers_experts import gating_of, names_of
from marlin_w4a16.passes.outcome import Rejected

# The projections of an expert by name, where a checkpoint holds them one by one and transformers knows stacks alone:
# which of the two products, and the place in it of those that are below each other.
_PLACES = {
    "gate_proj": (0, 0), "w1": (0, 0), "up_proj": (0, 1), "w3": (0, 1), "gate_up_proj": (0, 0), "w13": (0, 0),
    "down_proj": (1, 0), "w2": (1, 0),
}  # fmt: skip
_WHOLE = ("gate_up_proj", "w13")
_ALONE = re.compile(r"(?P<path>(?P<layer>.*\.\d+)\.(?:.*\.)?experts)\.\d+\.(?P<name>\w+)")
_STACKED = ("MergeModulelist", "Concatenate")  # what transformers does to experts that are stacked as they are


@dataclass(frozen=True, slots=True)
class Destination:
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


@dataclass(frozen=True, slots=True)
class Gathered:
    """The experts of one module: what files hold of them, and what the module computes (see `PackedExperts`)."""

    mixture: StoredMixture
    activation: Activation
    order: Order | None


# What a checkpoint has for one Experts module by parameter: layers by place in it and number of the expert.
_Layers = dict[str, tuple[Destination, dict[int, dict[int, Layer]]]]


class ExpertLayers:
    """Gathers the layers of experts, module by module."""

    def __init__(self, model: nn.Module) -> None:
        found = ((path, as_experts(module)) for path, module in model.named_modules())
        self._modules: dict[str, Any] = {path: experts for path, experts in found if experts is not None}
        self._found: dict[str, _Layers] = {}
        self.elsewhere = set[str]()  # paths below which files hold experts that the model has at others

    @property
    def paths(self) -> Collection[str]:
        """Of the modules of which there are layers."""
        return self._found

    def take(self, layer: Layer, target: Destination) -> bool:
        """Whether a layer belongs to experts; it is remembered then."""
        path, _, name = target.name.rpartition(".")
        if path not in self._modules:
            target = self._alone(target.name) or target
            path, _, name = target.name.rpartition(".")
        if path not in self._modules:
            return False
        _, places = self._found.setdefault(path, {}).setdefault(name, (target, {}))
        places.setdefault(target.place, {})[_number(layer)] = layer
        return True

    def _alone(self, name: str) -> Destination | None:
        """The place of a projection of one expert in the stacks of the only Experts module of its layer."""
        found = _ALONE.fullmatch(name.removesuffix(".weight"))
        if found is None or found["name"] not in _PLACES:
            return None
        layer = f"{found['layer']}."
        paths = [path for path in self._modules if path.startswith(layer) or f".{layer}" in f".{path}"]
        if len(paths) != 1:
            return None
        product, place = _PLACES[found["name"]]
        module = self._modules[paths[0]]
        places = 2 if not product and module.has_gate and found["name"] not in _WHOLE else 1
        at = place if places > 1 else 0
        self.elsewhere |= {found["path"]} - {paths[0]}
        return Destination(f"{paths[0]}.{names_of(module)[product]}", at, places)

    def gathered(self, others: Mapping[str, Entry]) -> tuple[tuple[Gathered, ...], list[Problem]]:
        """The experts of all modules, and what is wrong; ``others`` are other tensors by their names in the model."""
        made = [_gathered(path, self._modules[path], found) for path, found in self._found.items()]
        gathered = tuple(found for found in made if isinstance(found, Gathered))
        problems = [problem for problem in made if isinstance(problem, Problem)]
        for mixture in (found.mixture for found in gathered):
            problems += _biases(mixture, self._modules[mixture.path], others)
        return gathered, problems


def _gating(module: Any, rows: int) -> tuple[Activation, Order | None] | Rejected:
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


def _gathered(path: str, module: Any, found: _Layers) -> Gathered | Problem:
    stacks: dict[str, tuple[Stack, ...]] = {}
    for name in names_of(module):
        made = list(_stacks(path, module, name, found))
        wrong = next((stack for stack in made if isinstance(stack, Problem)), None)
        if wrong is not None:
            return wrong
        stacks[name] = tuple(stack for stack in made if isinstance(stack, Stack))
    first, second = (stacks[name] for name in names_of(module))
    mixture = StoredMixture(path, first, second[0])
    refused = _refused(mixture, module)
    if refused is not None:
        return refused
    gating = _gating(module, mixture.rows)
    if isinstance(gating, Rejected):
        why = f"experts that do not run as one op: {gating.reason}"
        return Problem(mixture.second.like.file, path, why, "experts that do")
    if gating[1] not in (None, Order.GATE_UP) and len(first) > 1:
        why = "a gate and an up for each expert"
        return Problem(first[0].like.file, path, why, f"one tensor of both, since the model has them {gating[1].value}")
    return Gathered(mixture, *gating)


def _stacks(path: str, module: Any, name: str, found: _Layers) -> Iterator[Stack | Problem]:
    """The projections that make one parameter of an Experts module."""
    if name not in found:
        yield Problem(None, f"{path}.{name}", "no such tensor in any file", "experts in FP4, as their others are")
        return
    target, places = found[name]
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
            found_text = f"no FP4 tensors of expert {missing[0]}{more} in any file"
            yield Problem(None, f"{path}.{name}", found_text, f"those of {shape[0]} experts, as the model has")
        elif surplus := [e for e in layers if e >= shape[0]]:
            extra, expected = layers[surplus[0]], f"{shape[0]} experts, as the model has"
            yield Problem(extra.file, extra.path, f"expert {surplus[0]}", expected)
        elif odd_one := next((layer for layer in layers.values() if _look(layer) != _look(layers[0])), None):
            yield Problem(odd_one.file, odd_one.path, _told(odd_one), f"{_told(layers[0])}, as expert 0 has")
        else:
            yield Stack(layers[0].path.rpartition(".")[2], tuple(layers[e] for e in sorted(layers)))


def _biases(mixture: StoredMixture, module: Any, others: Mapping[str, Entry]) -> Iterator[Problem]:
    """What is wrong with the biases of experts, which transformers loads."""
    for name in names_of(module) if module.has_bias else ():
        bias, shape = f"{mixture.path}.{name}_bias", tuple(module._parameters[f"{name}_bias"].shape)
        found = others.get(bias)
        if found is None:
            yield Problem(None, bias, "no such tensor", f"{list(shape)}, since the model has a bias")
        elif found.shape != shape:
            yield Problem(found.file.name, bias, str(found), f"shape {list(shape)}")


def _look(layer: Layer) -> tuple[Any, ...]:
    """What all experts must have alike; scales of inputs, which nothing uses, some may lack."""
    looked = {leaf: entry for leaf, entry in layer.entries.items() if leaf not in layer.inputs}
    entries = {leaf: (entry.dtype, entry.shape) for leaf, entry in looked.items()}
    return layer.format, layer.n, layer.k, layer.group, entries


def _told(layer: Layer) -> str:
    return f"{layer.format} of {layer.n} x {layer.k} in {', '.join(layer.entries)}"


def _refused(mixture: StoredMixture, module: Any) -> Problem | None:
    """Why the weights of experts are not those that a module runs as one op."""
    path, like, file = mixture.path, mixture.second.like, mixture.second.like.file
    for stack in mixture.stacks:
        if not isinstance(stack.like.storage, FP4Storage):
            return Problem(file, path, f"{stack.name} in {stack.like.format}", "experts in FP4")
        beside = [part for part in stack.storage.parts if part.role in ("pre-quant scale", *LOW_RANK)]
        held = next((part.leaf for part in beside if part.leaf in stack.like.entries), None)
        if held is not None:
            return Problem(file, path, f"{held} of experts", "none: experts run without AWQ and SVDQuant")
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
    return None
