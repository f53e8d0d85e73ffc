"""What a checkpoint is made of, for spoilers to change before it is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spoiled.healthy import Healthy

CONFIG, OTHER, INDEX, SINGLE = (
    "config.json",
    "hf_quant_config.json",
    "model.safetensors.index.json",
    "model.safetensors",
)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
DEEP = 10_000
_MARKS = {'"@lists@"': "[" * DEEP + "]" * DEEP, '"@objects@"': '{"a":' * DEEP + "1" + "}" * DEEP}
# The leaf of the codes of a weight, and how its path is joined to it.
_CODES = re.compile(r"(?P<path>.*[^.])(?P<joint>[._])(?:weight_packed|qweight|_weight_qdata|weight|blocks)")


@dataclass
class Parts:
    """A checkpoint in memory.

    Attributes:
        healthy: what it was.
        config: config.json.
        other: hf_quant_config.json, or None.
        shards: tensors by name, by file.
        metadata: of the headers.
        index: or None, where there is a single file.
        values: what the dense model has instead, by name: of weights that are others, and nothing wrong with them.
        after: what is done to the folder at last.
    """

    healthy: Healthy
    config: dict[str, Any]
    other: dict[str, Any] | None
    shards: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]
    index: Any = None
    values: dict[str, Tensor] = field(default_factory=dict)
    after: list[Callable[[Path], Any]] = field(default_factory=list)

    @classmethod
    def of(cls, healthy: Healthy, sharded: bool) -> Parts:
        """Those of a healthy checkpoint; in two files, if it is said to be."""
        folder = healthy.folder
        tensors = load_file(folder / SINGLE)
        with safe_open(folder / SINGLE, "pt") as opened:
            metadata = dict(opened.metadata() or {})
        other = json.loads((folder / OTHER).read_text()) if (folder / OTHER).exists() else None
        made = cls(healthy, json.loads((folder / CONFIG).read_text()), other, {SINGLE: tensors}, metadata)
        if sharded:
            names = sorted(tensors)
            halves = names[::2], names[1::2]
            made.shards = {
                file: {name: tensors[name] for name in half} for file, half in zip(SHARDS, halves, strict=True)
            }
            made.index = made.true_index()
        return made

    @property
    def quantization(self) -> tuple[str, dict[str, Any]]:
        """The file in which the quantisation config stands, and the config."""
        if self.other is not None:
            return OTHER, self.other["quantization"]
        return CONFIG, self.config.get("quantization", self.config.get("quantization_config"))

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return sorted({name for held in self.shards.values() for name in held})

    def true_index(self) -> dict[str, Any]:
        """What an index has to say."""
        named = {name: file for file, held in self.shards.items() for name in held}
        size = sum(t.nbytes for held in self.shards.values() for t in held.values())
        return {"metadata": {"total_size": size}, "weight_map": named}

    def quantised(self) -> dict[str, list[str]]:
        """The names of the tensors of each packed weight by its path; the first is that of its codes."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            match = _CODES.fullmatch(name)
            if match and str(self.tensor(name).dtype) in ("torch.uint8", "torch.uint32", "torch.float8_e4m3fn"):
                start = match["path"] + match["joint"]
                rest = [n for n in self.names if n.startswith(start) and n != name and not n.endswith("bias")]
                found[match["path"]] = [name, *rest]
        return {path: names for path, names in found.items() if len(names) > 1}

    def tensor(self, name: str) -> Tensor:
        return next(held[name] for held in self.shards.values() if name in held)

    def put(self, name: str, tensor: Tensor) -> None:
        """In the place of one of that name, else in the first file."""
        file = next((f for f, held in self.shards.items() if name in held), next(iter(self.shards)))
        self.shards[file][name] = tensor
        if self.index is not None and isinstance(self.index, dict) and isinstance(self.index.get("weight_map"), dict):
            self.index["weight_map"][name] = file

    def drop(self, *names: str) -> None:
        for held in self.shards.values():
            for name in names:
                held.pop(name, None)
        if isinstance(self.index, dict) and isinstance(self.index.get("weight_map"), dict):
            self.index["weight_map"] = {k: v for k, v in self.index["weight_map"].items() if k not in names}

    def file(self, rng: Random) -> str:
        """The name of one of the files of weights."""
        return rng.choice(sorted(self.shards))

    def write(self, folder: Path) -> None:
        """Into an empty folder."""
        shutil.copy(self.healthy.folder / "generation_config.json", folder)
        (folder / CONFIG).write_text(text(self.config))
        if self.other is not None:
            (folder / OTHER).write_text(text(self.other))
        if self.index is not None:
            (folder / INDEX).write_text(text(self.index))
        for file, held in self.shards.items():
            save_file({k: t.contiguous().clone() for k, t in held.items()}, folder / file, {**self.metadata})
        for change in self.after:
            change(folder)


def text(value: Any) -> str:
    """JSON, with what is nested deeply in the place of its mark."""
    made = json.dumps(value)
    for mark, deep in _MARKS.items():
        made = made.replace(mark, deep)
    return made


def nodes(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all that lies in some JSON, but for its root."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*at, key)
        yield from nodes(one, (*at, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """What stands at a path."""
    for key in path:
        value = value[key]
    return value
