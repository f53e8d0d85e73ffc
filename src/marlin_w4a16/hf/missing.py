"""What a model needs and no file holds, told from headers: transformers would fill it with random numbers."""

import re
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Problem
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.hf.renaming import Renaming

_BESIDE = re.compile(r"scale|qzeros|absmax|biases$")  # what stands beside a quantised weight
_FLOATS = ("F64", "F32", "BF16", "F16")


def missing(
    model: PreTrainedModel,
    others: Mapping[str, Entry],
    renamed: Renaming,
    mine: Collection[str],
    scheme: Scheme,
    scaled: Collection[str] = (),
) -> Iterator[Problem]:
    """The parameters and buffers of a model that no tensor becomes, or one of another shape or of bytes.

    A class that is not the one the checkpoint was saved from may have a head of its own, which is new.

    Args:
        model: without values.
        others: the tensors that transformers loads.
        renamed: their names in the model.
        mine: paths of the modules that are loaded here.
        scheme: what the quantisation config says. Where transformers' own quantizer loads some linears, these may be
            stored as it pleases.
        scaled: names of parameters that are loaded as FP8 codes, and multiplied.
    """
    made = renamed.made(others)
    own = {f"{path}." for path in mine}
    stored_otherwise = {renamed(f"{name.rpartition('.')[0]}.weight"): name for name in others if _BESIDE.search(name)}
    for name, tensor in renamed.state.items():
        if f"{name.rpartition('.')[0]}." in own or not _is_needed(name, model):
            continue
        found = made.get(name)
        if found is None:
            if not _is_tied(name, model, made, own) and not _is_optional(name, model):
                but = f", but {stored_otherwise[name].rpartition('.')[2]}" if name in stored_otherwise else ""
                yield Problem(None, name, f"no such tensor in any file{but}", _wanted(name, tensor, model, scheme))
        elif isinstance(found, str):
            yield Problem(None, name, found, f"shape {list(tensor.shape)}")
        elif not (scheme.shares and _is_stored_otherwise(name, found[0], stored_otherwise)):
            entry, shape = found
            if shape != tuple(tensor.shape):
                yield Problem(entry.file.name, name, f"shape {list(shape)}", f"{list(tensor.shape)}, as the model has")
            elif tensor.is_floating_point() and name not in scaled and entry.dtype not in _FLOATS:
                yield Problem(entry.file.name, name, str(entry), f"dtype {' or '.join(_FLOATS)}")


def _is_stored_otherwise(name: str, entry: Entry, quantised: Collection[str]) -> bool:
    """Whether a tensor may be what another quantizer makes a parameter of."""
    return entry.dtype not in _FLOATS and name in quantised


def _is_needed(name: str, model: PreTrainedModel) -> bool:
    saved_from = model.config.architectures or [type(model).__name__]
    body = "" if model.base_model is model else f"{model.base_model_prefix}."
    return type(model).__name__ in saved_from or name.startswith(body)


def _is_tied(name: str, model: PreTrainedModel, made: Collection[str], own: Collection[str]) -> bool:
    """Whether a parameter is given the values of another one."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    source = tied.get(name, name)
    group = {source, *(target for target, other in tied.items() if other == source)} - {name}
    return any(other in made or f"{other.rpartition('.')[0]}." in own for other in group)


def _is_optional(name: str, model: PreTrainedModel) -> bool:
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _wanted(name: str, tensor: Tensor, model: PreTrainedModel, scheme: Scheme) -> str:
    path, _, leaf = name.rpartition(".")
    is_weight = leaf == "weight" and isinstance(model.get_submodule(path), nn.Linear)
    storage = scheme.storage(path) if is_weight else None
    return f"one ({storage.label})" if isinstance(storage, FP4Storage) else f"one of shape {list(tensor.shape)}"
