"""Headers of tensors, held against a scheme without any file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Contents, contents
from marlin_w4a16.checkpoints.scheme import Scheme

Tensor = tuple[str, tuple[int, ...]]
UP = "model.layers.0.mlp.up_proj"


def hold(scheme: Scheme, **modules: dict[str, Tensor | None]) -> Contents:
    """The tensors of modules; None: not there."""
    named = {f"{path}.{leaf}": t for path, tensors in modules.items() for leaf, t in tensors.items() if t is not None}
    return contents({name: Entry(Path("folder/x.safetensors"), *tensor) for name, tensor in named.items()}, scheme)


def problem(scheme: Scheme, tensors: dict[str, Tensor | None], path: str = UP) -> str:
    """The one thing that is wrong; the tensors belong to no layer."""
    held = hold(scheme, **{path: tensors})
    assert not held.layers and held.others.keys() == {f"{path}.{leaf}" for leaf, t in tensors.items() if t is not None}
    (found,) = held.problems
    return str(found)


def fields(config: Mapping[str, Any]) -> Fields:
    """A quantisation config, as the readers take it."""
    return Fields(config, "config.json: quantization_config")
