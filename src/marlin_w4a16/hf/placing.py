"""Where the layers of a checkpoint stand in a transformers model; transformers 5.17 to 5.23 were read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints import mlx
from marlin_w4a16.checkpoints.experts import StoredMixture
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import CACHE_SCALE, Contents, Layer, Problem, counted
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.hf.experts.batched import as_experts
from marlin_w4a16.hf.experts.gather import Destination, ExpertLayers, Gathered
from marlin_w4a16.hf.experts.modules import StoredExperts
from marlin_w4a16.hf.joined import StoredParts
from marlin_w4a16.hf.linear import StoredLinear
from marlin_w4a16.hf.missing import missing
from marlin_w4a16.hf.renaming import Renaming
from marlin_w4a16.hf.scaled import Scaled
from marlin_w4a16.modules.swaps import untie
from marlin_w4a16.producers.found import is_linear
from marlin_w4a16.quantize.dense import read_outside
from marlin_w4a16.quantize.readers import Readers

_Parts = dict[str, dict[int, tuple[Destination, Layer]]]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the layers of a checkpoint go.

    Attributes:
        layers: of linears, by module path in the model.
        joined: those that are one linear of the model, one below the other.
        read: why the weight of a linear is decoded: code of the model reads it.
        scaled: FP8 weights of other modules, which are multiplied when they are loaded.
        experts: those of each module.
        elsewhere: paths below which files hold experts and parts of linears that the model has at others.
        others: the names in the model of all other tensors, by those in the checkpoint.
        cache_scales: those of a quantised key/value cache by the name they would have in the model.
        problems: why some have no place, or places no layer.
        notes: what is not as the config or the model has it.
    """

    layers: Mapping[str, Layer]
    joined: Mapping[str, tuple[Layer, ...]]
    read: Mapping[str, str]
    scaled: tuple[Scaled, ...]
    experts: tuple[Gathered, ...]
    elsewhere: frozenset[str]
    others: Mapping[str, str]
    cache_scales: Mapping[str, Entry]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]

    @property
    def mixtures(self) -> tuple[StoredMixture, ...]:
        """All experts, as files hold them."""
        return tuple(found.mixture for found in self.experts)

    @property
    def every(self) -> Iterator[Layer]:
        """All layers that are loaded."""
        yield from self.layers.values()
        yield from (layer for layers in self.joined.values() for layer in layers)
        yield from (layer for mixture in self.mixtures for layer in mixture.layers)


def place(contents: Contents, model: PreTrainedModel, scheme: Scheme) -> Placement:
    """Finds the module of each layer, by the names under which transformers would load it."""
    renamed = Renaming(model)
    layers: dict[str, Layer] = {}
    parts: _Parts = {}
    scaled = [
        Scaled(renamed(names[0]), (scale, renamed(scale)), entry) for names, scale, entry in contents.shards.values()
    ]
    loose = dict(contents.others)
    experts, problems, surplus, wrong = ExpertLayers(model), list[Problem](), list[str](), set[str]()
    for layer in contents.layers.values():
        target = renamed.target(layer)
        path = target.name.removesuffix(".weight")
        module = _module(model, path)
        if experts.take(layer, target):
            continue
        if module is None:
            surplus.append(layer.path)
        elif target.places > 1 and isinstance(module, nn.Linear):
            parts.setdefault(path, {})[target.place] = target, layer
        elif (one := _scaled(layer, path, module, renamed)) is not None:
            scaled.append(one)
            loose |= {layer.name(leaf): entry for leaf, entry in layer.entries.items() if leaf == "weight"}
        elif (problem := _misfit(layer, path, module)) is None:
            layers[path] = layer
        else:
            problems.append(problem)
            wrong.add(path)
    joined, odd = _joined(parts, model)
    others = {name: renamed(name) for name in loose}
    held = {others[name]: entry for name, entry in loose.items()}
    gathered, unlike = experts.gathered(held)
    first = {path: layers[0] for path, layers in joined.items()}
    problems += [*odd, *unlike, *_biases(model, {**layers, **first}, held)]
    names = (renamed(name) for path in contents.wrong for name in (path, f"{path}.weight"))
    wrong |= {name.rpartition(".")[0] for name in names}
    mine = {*layers, *parts, *experts.paths, *wrong}
    problems += missing(model, loose, renamed, mine, scheme, {one.parameter for one in scaled})
    problems += _undecodable(loose, renamed) if scheme.decodes else ()
    cache_scales = {name: entry for name, entry in held.items() if CACHE_SCALE.search(name)}
    read, notes = dict(_read_by_code(model, layers)), [*_dense(model, others, scheme)]
    notes += [f"{counted(surplus)}: not loaded, the model has no such layer"] if surplus else []
    notes += [f"{counted(list(read))}: dense, since {next(iter(read.values()))}"] if read else []
    of_parts = (renamed(layer.name(leaf)) for layers in joined.values() for layer in layers for leaf in layer.entries)
    elsewhere = frozenset({*experts.elsewhere, *(name.rpartition(".")[0] for name in of_parts)})
    rest = elsewhere, others, cache_scales, tuple(problems), tuple(notes)
    return Placement(layers, joined, read, tuple(scaled), gathered, *rest)


def swap_in(model: PreTrainedModel, placement: Placement, dtype: torch.dtype, keep: bool, alone: bool) -> None:
    """Puts a `StoredLinear` on the meta device in place of each linear, and `StoredExperts` in place of experts.

    ``keep`` and ``alone`` are of `StoredLinear`.
    """
    untie(model, placement.layers)  # a head with FP4 tensors of its own, under a config that ties it (both producers)
    for path, layer in placement.layers.items():
        linear: Any = model.get_submodule(path)
        stored = StoredLinear(layer, linear.bias, dtype, keep, path in placement.read, alone)
        put(model, path, stored.train(linear.training))
    for path, layers in placement.joined.items():
        linear = model.get_submodule(path)
        put(model, path, StoredParts(layers, linear.bias, dtype).train(linear.training))
    for found in placement.experts:
        experts = as_experts(model.get_submodule(found.mixture.path))
        put(model, found.mixture.path, StoredExperts(found, experts, dtype).train(experts.training))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _scaled(layer: Layer, path: str, module: nn.Module, renamed: Renaming) -> Scaled | None:
    """An FP8 weight with one scale, of a module that is no linear."""
    entry = layer.entries.get("weight_scale")
    weight = module._parameters.get("weight")
    if isinstance(layer.storage, FP4Storage) or isinstance(module, nn.Linear) or entry is None or weight is None:
        return None
    if tuple(weight.shape) != (layer.n, layer.k) or math.prod(entry.shape) != 1:
        return None
    name = layer.name("weight_scale")
    return Scaled(f"{path}.weight", (name, renamed(name)), entry)


def _misfit(layer: Layer, path: str, module: nn.Module) -> Problem | None:
    found, expected = f"{layer.format} of {layer.n} x {layer.k}", None
    if not isinstance(module, nn.Linear) or not is_linear(type(module)):
        expected = f"a linear in the model, not {type(module).__name__}"
    elif (module.out_features, module.in_features) != (layer.n, layer.k):
        expected = f"{module.out_features} x {module.in_features}, as the model's {path} has"
    return None if expected is None else Problem(layer.file, layer.name(next(iter(layer.entries))), found, expected)


def _joined(parts: _Parts, model: nn.Module) -> tuple[dict[str, tuple[Layer, ...]], list[Problem]]:
    """The linears that transformers makes of several, and what is wrong with them."""
    joined, problems = dict[str, tuple[Layer, ...]](), list[Problem]()
    for path, found in parts.items():
        target, first = next(iter(found.values()))
        layers = tuple(found[place][1] for place in sorted(found))
        linear: Any = model.get_submodule(path)
        is_whole = len(layers) == target.places and target.operations == ("Concatenate",)
        alike = len({(layer.format, layer.k) for layer in layers}) == 1
        plain = not any(layer.has("pre-quant scale", "rotation", "low rank a") for layer in layers)
        shape = sum(layer.n for layer in layers), first.k
        if is_whole and alike and plain and shape == (linear.out_features, linear.in_features):
            joined[path] = layers
            continue
        told = " and ".join(f"{layer.format} of {layer.n} x {layer.k}" for layer in layers)
        expected = f"{target.places} of one format, {linear.out_features} x {linear.in_features} in all, as {path} has"
        problems.append(Problem(first.file, counted([layer.path for layer in layers]), told, expected))
    return joined, problems


def _undecodable(others: Mapping[str, Entry], renamed: Renaming) -> Iterator[Problem]:
    """What is wrong with the matrices that the quantizer of MLX decodes."""
    for path, entries in mlx.packed(others).items():
        parameter = renamed.state.get(renamed(f"{path}.weight"))
        found = None if parameter is None else mlx.misfit(entries, tuple(parameter.shape))
        if found is not None and parameter is not None:
            expected = f"a matrix of {list(parameter.shape)} in a mode of MLX"
            yield Problem(entries["weight"].file.name, f"{path}.weight", found, expected)


def _dense(model: nn.Module, others: Mapping[str, str], scheme: Scheme) -> Iterator[str]:
    """What is told of linears that should be FP4 and are dense."""
    linears = {f"{path}.weight" for path, module in model.named_modules() if is_linear(type(module))}
    paths = (name.removesuffix(".weight") for name, become in others.items() if become in linears)
    found = [path for path in paths if isinstance(scheme.storage(path), FP4Storage)]
    if found:
        yield f"{counted(found)}: dense in the files, though the config says they are FP4; loaded as they are"


def _read_by_code(model: nn.Module, layers: Mapping[str, Layer]) -> Iterator[tuple[str, str]]:
    """Linears of which a method of the model reads the weight itself, not only its dtype, and which that is."""
    readers, why = Readers(model), "which is empty in a packed linear"
    for path in (path for path, layer in layers.items() if isinstance(layer.storage, FP4Storage)):
        reason = read_outside(readers, model.get_submodule(path), ("weight",), why, ("dtype", "device"))
        if reason is not None:
            yield path, reason


def _biases(model: PreTrainedModel, layers: Mapping[str, Layer], held: Mapping[str, Entry]) -> Iterator[Problem]:
    """What is wrong with the biases of linears that are loaded here."""
    for path, layer in layers.items():
        bias, linear = f"{path}.bias", cast(nn.Linear, model.get_submodule(path))
        found, n = held.get(bias), linear.out_features
        if linear.bias is None and found is not None:
            yield Problem(layer.file, bias, "a bias", "none, since the model has no bias")
        elif linear.bias is not None and found is None:
            yield Problem(layer.file, bias, "no such tensor", f"[{n}], since the model has a bias")
        elif linear.bias is not None and found is not None and found.shape != (n,):
            yield Problem(layer.file, bias, str(found), f"shape [{n}]")
