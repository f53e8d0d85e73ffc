"""What can be wrong with a checkpoint: each function spoils a folder in one way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
Tensors = dict[str, Tensor]


def file_of(folder: Path, name: str) -> Path:
    """The file that holds a tensor, or would."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if name in file.keys():  # noqa: SIM118, it is no mapping
                return path
    return sorted(folder.glob("*.safetensors"))[0]


def edit(folder: Path, name: str, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of the file that holds ``name``, and the index with it."""
    path = file_of(folder, name)
    before = load_file(path)
    after = dict(before)
    change(after)
    save_file({name: tensor.contiguous() for name, tensor in after.items()}, path, metadata={"format": "pt"})
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        kept = {name: file for name, file in index["weight_map"].items() if name not in before}
        index["weight_map"] = kept | dict.fromkeys(after, path.name)
        (folder / INDEX).write_text(json.dumps(index))


def drop(folder: Path, name: str) -> None:
    """A tensor is missing."""
    edit(folder, name, lambda tensors: tensors.pop(name))


def put(folder: Path, name: str, tensor: Tensor) -> None:
    """A tensor has other values, or is one that nobody asked for."""
    edit(folder, name, lambda tensors: tensors.update({name: tensor}))


def alter(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """A tensor is a function of what it was."""
    edit(folder, name, lambda tensors: tensors.update({name: change(tensors[name])}))


def cut_columns(folder: Path, name: str, columns: int = 1) -> None:
    """A tensor lacks its last columns."""
    alter(folder, name, lambda tensor: tensor[..., :-columns])


def cast(folder: Path, name: str, dtype: torch.dtype) -> None:
    """A tensor has the same values in another dtype."""
    alter(folder, name, lambda tensor: tensor.to(dtype))


def not_a_number(folder: Path, name: str) -> None:
    """A scale is NaN: E4M3, E8M0 or a float."""

    def change(scale: Tensor) -> Tensor:
        scale.view(-1)[-1] = torch.nan if scale.is_floating_point() else 255
        return scale

    alter(folder, name, change)


def truncate(folder: Path, name: str) -> None:
    """The file that holds a tensor ends in the middle."""
    path = file_of(folder, name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lead_outside(folder: Path, name: str) -> Path:
    """The index says that a tensor lies in ``../x.safetensors``; it does, in the file that is returned."""
    if not (folder / INDEX).exists():
        shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}
        (folder / INDEX).write_text(json.dumps(index))
    tensor = load_file(file_of(folder, name))[name]
    drop(folder, name)
    outside = folder.parent / "x.safetensors"
    save_file({name: tensor}, outside, metadata={"format": "pt"})
    repoint(folder, {name: "../x.safetensors"})
    return outside


def repoint(folder: Path, files: dict[str, str]) -> None:
    """The index says that tensors lie in other files."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(files)
    (folder / INDEX).write_text(json.dumps(index))


def configure(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Entries of the quantisation config are others; ``None`` takes one out."""
    path = folder / file
    whole = json.loads(path.read_text())
    part = whole["quantization_config" if file == "config.json" else "quantization"]
    part.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del part[key]
    path.write_text(json.dumps(whole, indent=2))


def configure_model(folder: Path, **changes: Any) -> None:
    """Entries of config.json itself are others."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))
