"""Whether a checkpoint fits the model that its config names, told from headers: what `from_pretrained` would refuse."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.layers import Contents, Problem
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.hf.placing import Placement, place


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a checkpoint fits its model.

    Attributes:
        placement: where its layers would go.
        wide: the names of its tensors of 16 bits that transformers keeps in float32.
    """

    placement: Placement
    wide: frozenset[str]


def fit(folder: Path, held: Contents, scheme: Scheme) -> Fitted | Problem | str:
    """How a folder fits its model; or why no model can be made; or why that is not known."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it asks the user, and waits
    except Exception as error:  # whatever transformers raises of a config
        text = _shown(error)
        known = ("trust_remote_code", "model type", "model_type", "Unrecognized model")
        if any(word in str(error) for word in known):
            return f"not held against a model: {text}"
        return Problem(
            "config.json", "the config", f"one of which transformers can make no model: {text}", "a valid one"
        )
    found = config_problem(getattr(config, "quantization_config", {}))
    if found is not None:
        return found
    name = next(iter(config.architectures or ()), None)
    cls = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        return f"not held against a model: transformers {transformers.__version__} has no class {name}"
    try:
        with torch.device("meta"):
            model = cls(config)
    except Exception as error:  # whatever a model's own code raises
        return Problem(
            "config.json", str(name), f"a config of which no model can be made: {_shown(error)}", "a valid one"
        )
    placement = place(held, model, scheme)
    return Fitted(placement, frozenset(_wide(placement, held, model, scheme)))


def _wide(found: Placement, held: Contents, model: PreTrainedModel, scheme: Scheme) -> Iterator[str]:
    patterns = model._keep_in_fp32_modules_strict or ()
    if scheme.shares and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        return  # what its quantizer of FP8 loads stays in the dtype of the files
    kept = re.compile("|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in patterns) or "(?!)")
    for name, become in found.others.items():
        if kept.search(become) and held.others[name].dtype in ("BF16", "F16"):
            yield name


def is_known(method: str) -> bool:
    """Whether transformers has a quantizer of this name."""
    return method in AUTO_QUANTIZATION_CONFIG_MAPPING


def config_problem(config: Mapping[str, Any]) -> Problem | None:
    """Why no quantizer takes a quantisation config, as far as its entries tell."""
    try:
        AutoQuantizationConfig.from_dict({**config})
    except CheckpointError as error:
        where, _, found = str(error).partition(": found ")
        return Problem("config.json", where.removeprefix("config.json: "), found, "a valid one")
    except Exception:  # of a package that is missing, or of a quantizer that is none of ours
        return None
    return None


def problems_of(found: Fitted | Problem | str) -> Iterator[Problem]:
    """What of that keeps a checkpoint from being loaded."""
    if isinstance(found, Fitted):
        yield from found.placement.problems
    elif isinstance(found, Problem):
        yield found


def notes_of(found: Fitted | Problem | str) -> Iterator[str]:
    """What else there is to be told."""
    if isinstance(found, Fitted):
        yield from found.placement.notes
    elif isinstance(found, str):
        yield found


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
