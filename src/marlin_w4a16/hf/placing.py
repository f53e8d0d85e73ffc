"""Where the layers of a checkpoint stand in a transformers model; transformers 5.17 to 5.23 were read."""

import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import BESIDE, Contents, Layer, Problem
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.hf.linear import StoredLinear
from marlin_w4a16.producers.found import is_linear

# ModelOpt: self_attn.k_proj.k_scale, compressed-tensors: self_attn.k_scale
CACHE_SCALE = re.compile(r"\.[qkv]_scale$")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the layers of a checkpoint go.

    Attributes:
        layers: by module path in the model.
        cache_scales: those of a quantised key/value cache by the name they would have in the model.
        problems: why some have no place, or places no layer.
    """

    layers: Mapping[str, Layer]
    cache_scales: Mapping[str, Entry]
    problems: tuple[Problem, ...]


def place(contents: Contents, model: PreTrainedModel, scheme: Scheme) -> Placement:
    """Finds the module of each layer, by the names under which transformers would load it."""
    renamed = _renaming(model)
    layers: dict[str, Layer] = {}
    problems: list[Problem] = []
    stored: set[str] = set()  # module paths of which the checkpoint holds a weight, be it right or wrong
    for layer in contents.layers.values():
        path = renamed(f"{layer.path}.weight").removesuffix(".weight")
        module = _module(model, path)
        stored.add(path)
        if module is None and _not_run(path, model):
            continue
        problem = _misfit(layer, path, module)
        if problem is None:
            layers[path] = layer
        else:
            problems.append(problem)
    held = {renamed(name): entry for name, entry in contents.others.items()}
    stored |= {path for path, _, leaf in (name.rpartition(".") for name in held) if leaf not in BESIDE}
    problems += [*_without_weight(model, stored, scheme), *_biases(model, layers, held)]
    return Placement(layers, {n: e for n, e in held.items() if CACHE_SCALE.search(n)}, tuple(problems))


def swap_in(model: PreTrainedModel, layers: Mapping[str, Layer], dtype: torch.dtype, keep: bool) -> None:
    """Puts a `StoredLinear` on the meta device in place of each linear."""
    for path, layer in layers.items():
        linear = model.get_submodule(path)
        put(model, path, StoredLinear(layer, linear.bias, dtype, keep).train(linear.training))  # type: ignore[arg-type]
    for name, source in list(model.all_tied_weights_keys.items()):
        # a head with FP4 tensors of its own beside a dense embedding, under a config that ties them (both producers)
        if name.rpartition(".")[0] in layers or source.rpartition(".")[0] in layers:
            del model.all_tied_weights_keys[name]


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _renaming(model: PreTrainedModel) -> Callable[[str], str]:
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()

    def renamed(name: str) -> str:
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if new not in state and name in state:  # as in transformers' convert_and_load_state_dict_in_model
            new, _ = rename_source_key(name, [], [], model.base_model_prefix, state)
        return str(new)

    return renamed


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _misfit(layer: Layer, path: str, module: nn.Module | None) -> Problem | None:
    leaf, entry = next(iter(layer.entries.items()))
    found, expected = f"{layer.format} of {layer.n} x {layer.k}", None
    if module is None:
        expected = f"no such tensor: the model has no {path}"
    elif not isinstance(module, nn.Linear) or not is_linear(type(module)):
        expected = f"a linear in the model, not {type(module).__name__}"
    elif (module.out_features, module.in_features) != (layer.n, layer.k):
        expected = f"{module.out_features} x {module.in_features}, as the model's {path} has"
    return None if expected is None else Problem(entry.file.name, f"{layer.path}.{leaf}", found, expected)


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
        bias, file = f"{path}.bias", next(iter(layer.entries.values())).file.name
        wanted = getattr(model.get_submodule(path), "bias", None) is not None
        if wanted and bias not in held:
            found.append(Problem(file, bias, "no such tensor", f"[{layer.n}], since the model has a bias"))
        if wanted and bias in held and held[bias].shape != (layer.n,):
            found.append(Problem(file, bias, str(held[bias]), f"shape [{layer.n}]"))
        if not wanted and bias in held:
            found.append(Problem(file, bias, "a bias", "none, since the model has no bias"))
    return found
