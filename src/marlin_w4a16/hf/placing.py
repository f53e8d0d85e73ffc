"""Where the layers of a checkpoint stand in a transformers model; transformers 5.17 to 5.23 were read."""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from marlin_w4a16.checkpoints.experts import StoredMixture
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import BESIDE, CACHE_SCALE, Contents, Layer, Problem
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.hf.experts.gather import Destination, ExpertLayers, Gathered
from marlin_w4a16.hf.experts.modules import StoredExperts
from marlin_w4a16.hf.linear import StoredLinear
from marlin_w4a16.modules.swaps import untie
from marlin_w4a16.producers.found import is_linear


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the layers of a checkpoint go.

    Attributes:
        layers: of linears, by module path in the model.
        experts: those of each module.
        others: the names in the model of all other tensors, by those in the checkpoint.
        cache_scales: those of a quantised key/value cache by the name they would have in the model.
        problems: why some have no place, or places no layer.
    """

    layers: Mapping[str, Layer]
    experts: tuple[Gathered, ...]
    others: Mapping[str, str]
    cache_scales: Mapping[str, Entry]
    problems: tuple[Problem, ...]

    @property
    def mixtures(self) -> tuple[StoredMixture, ...]:
        """All experts, as files hold them."""
        return tuple(found.mixture for found in self.experts)


def place(contents: Contents, model: PreTrainedModel, scheme: Scheme) -> Placement:
    """Finds the module of each layer, by the names under which transformers would load it."""
    renamed = _Renaming(model)
    layers: dict[str, Layer] = {}
    experts = ExpertLayers(model)
    problems: list[Problem] = []
    stored: set[str] = set()  # module paths of which the checkpoint holds a weight, be it right or wrong
    for layer in contents.layers.values():
        target = renamed.target(layer)
        path = target.name.removesuffix(".weight")
        module = _module(model, path)
        stored.add(path)
        if experts.take(layer, target):
            continue
        if module is None and _not_run(path, model):
            continue
        problem = _misfit(layer, path, module)
        if problem is None:
            layers[path] = layer
        else:
            problems.append(problem)
    others = {name: renamed(name) for name in contents.others}
    held = {others[name]: entry for name, entry in contents.others.items()}
    stored |= {path for path, _, leaf in (name.rpartition(".") for name in held) if leaf not in BESIDE}
    gathered, wrong = experts.gathered(held)
    problems += [*wrong, *_without_weight(model, stored, scheme), *_biases(model, layers, held)]
    cache_scales = {name: entry for name, entry in held.items() if CACHE_SCALE.search(name)}
    return Placement(layers, gathered, others, cache_scales, tuple(problems))


def swap_in(model: PreTrainedModel, placement: Placement, dtype: torch.dtype, keep: bool) -> None:
    """Puts a `StoredLinear` on the meta device in place of each linear, and `StoredExperts` in place of experts."""
    untie(model, placement.layers)  # a head with FP4 tensors of its own, under a config that ties it (both producers)
    for path, layer in placement.layers.items():
        linear = model.get_submodule(path)
        put(model, path, StoredLinear(layer, linear.bias, dtype, keep).train(linear.training))  # type: ignore[arg-type]
    for found in placement.experts:
        experts = model.get_submodule(found.mixture.path)
        put(model, found.mixture.path, StoredExperts(found, experts, dtype).train(experts.training))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


class _Renaming:
    """The names that transformers gives to the tensors of a checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def __call__(self, name: str) -> str:
        return self._renamed(name)[0]

    def target(self, layer: Layer) -> Destination:
        """Where transformers would put a layer."""
        path = layer.fp4.placed(layer.path) if layer.experts else layer.path
        name, pattern = self._renamed(f"{path}.weight" if layer.storage.joint == "." else path)
        converter = self._by_pattern[pattern] if pattern is not None else None
        if converter is None or pattern is None:
            return Destination(name)
        operations = tuple(type(operation).__name__ for operation in converter.operations)
        return Destination(name, converter.source_patterns.index(pattern), len(converter.source_patterns), operations)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        new, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if new not in self._state and name in self._state:  # as in transformers' convert_and_load_state_dict_in_model
            new, pattern = rename_source_key(name, [], [], self._prefix, self._state)
        return str(new), pattern


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _misfit(layer: Layer, path: str, module: nn.Module | None) -> Problem | None:
    found, expected = f"{layer.format} of {layer.n} x {layer.k}", None
    if module is None:
        expected = f"no such tensor: the model has no {path}"
    elif not isinstance(module, nn.Linear) or not is_linear(type(module)):
        expected = f"a linear in the model, not {type(module).__name__}"
    elif (module.out_features, module.in_features) != (layer.n, layer.k):
        expected = f"{module.out_features} x {module.in_features}, as the model's {path} has"
    return (
        None if expected is None else Problem(layer.file, f"{layer.path}.{next(iter(layer.entries))}", found, expected)
    )


def _not_run(path: str, model: PreTrainedModel) -> bool:
    """Whether transformers leaves a layer out that has no module: of another head, or one that the model ignores."""
    weight = f"{path}.weight"
    if any(re.search(pattern, weight) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
        return True
    return not path.startswith(f"{model.base_model_prefix}.")


def _without_weight(model: PreTrainedModel, stored: Set[str], scheme: Scheme) -> list[Problem]:
    """Linears that should be FP4 and of which there is nothing; transformers tells of all others that are missing."""
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    paths = (path for path, module in model.named_modules() if is_linear(type(module)) and path.startswith(body))
    return [
        Problem(None, f"{path}.weight", "no such tensor in any file", f"one ({storage.label})")
        for path in paths
        if path not in stored and isinstance(storage := scheme.storage(path), FP4Storage)
    ]


def _biases(model: PreTrainedModel, layers: Mapping[str, Layer], held: Mapping[str, Entry]) -> list[Problem]:
    found: list[Problem] = []
    for path, layer in layers.items():
        bias, file = f"{path}.bias", layer.file
        wanted = getattr(model.get_submodule(path), "bias", None) is not None
        if wanted and bias not in held:
            found.append(Problem(file, bias, "no such tensor", f"[{layer.n}], since the model has a bias"))
        if wanted and bias in held and held[bias].shape != (layer.n,):
            found.append(Problem(file, bias, str(held[bias]), f"shape [{layer.n}]"))
        if not wanted and bias in held:
            found.append(Problem(file, bias, "a bias", "none, since the model has no bias"))
    return found
