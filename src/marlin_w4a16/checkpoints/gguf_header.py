"""The header of a GGUF file: what its metadata say, and where its tensors lie; no values are read.

gguf's own reader maps each string of a vocabulary by itself, which takes seconds, and goes on for ever where a damaged
header counts more elements than the file has bytes.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_w4a16.checkpoints.files import CheckpointError

MAGIC, VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_AXES = 4  # GGML_MAX_DIMS
_ALIGNMENT = 32  # of tensors, where the metadata say nothing


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        type, type_name: the number and the name of its type in ggml, such as 8 and ``"Q8_0"``.
        shape: in elements, rows before columns.
        start: its first byte in the file.
        nbytes: its bytes.
    """

    type: int
    type_name: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the values.

    Attributes:
        file: the file.
        metadata: numbers, strings and arrays of numbers by key; of arrays of strings, how many there are.
        tensors: by name.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def architecture(self) -> str:
        """As llama.cpp names it."""
        return str(self.metadata["general.architecture"])

    def own(self, key: str) -> Any:
        """What the metadata say of the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


def header(file: Path) -> Header:
    """Reads the header of a file.

    Raises:
        CheckpointError: it is no whole GGUF file of version 2 or 3, or gguf is not installed.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as held:
            return _header(file, _Cursor(held))
    except (struct.error, IndexError, UnicodeDecodeError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: {error}: expected a whole GGUF file: download it again") from error


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, held: mmap.mmap) -> None:
        self.held, self.at = held, 0

    def take(self, size: int) -> bytes:
        if size > len(self.held) - self.at:
            raise IndexError(f"found its end in the header, {size} bytes from byte {self.at} on are missing")
        self.at += size
        return self.held[self.at - size : self.at]

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(form) * count
        return struct.unpack(f"<{count}{form}", self.take(size)) if size <= len(self.held) else self._short(size)

    def number(self, form: str) -> Any:
        return self.numbers(form)[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"found metadata of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            return self.numbers(_SCALARS[inner], count)
        if inner != _STRING:
            raise ValueError(f"found metadata in arrays of type {inner}")
        for _ in range(count):  # ends with the file: each takes eight bytes at least
            self.take(self.number("Q"))
        return count

    def _short(self, size: int) -> tuple[Any, ...]:
        self.take(size)
        return ()


def _header(file: Path, cursor: _Cursor) -> Header:
    if (found := cursor.take(4)) != MAGIC:
        raise CheckpointError(f"{file}: found {found!r} at its beginning, expected {MAGIC!r}: this is no GGUF file")
    if (version := cursor.number("I")) not in VERSIONS:
        raise CheckpointError(f"{file}: found version {version}, expected 2 or 3, little-endian")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    if not isinstance(metadata.get("general.architecture"), str):
        raise CheckpointError(f"{file}: general.architecture: found none, expected the name of an architecture")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & alignment - 1:
        raise CheckpointError(f"{file}: general.alignment: found {alignment}, expected a power of two")
    told = [_told(file, cursor) for _ in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    found_tensors: dict[str, Tensor] = {}
    for name, kind, shape, offset in told:
        one = Tensor(kind, *_sized(file, name, kind, shape, start + offset))
        if name in found_tensors:
            raise CheckpointError(f"{file}: {name}: found it twice, expected it once")
        if one.start + one.nbytes > len(cursor.held):
            missing = one.start + one.nbytes - len(cursor.held)
            raise CheckpointError(
                f"{file}: {name}: found the end of the file {missing} bytes before that of the tensor, expected a "
                "whole GGUF file: download it again"
            )
        found_tensors[name] = one
    return Header(file, metadata, found_tensors)


def _told(file: Path, cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, shape and place of a tensor."""
    name, axes = cursor.text(), cursor.number("I")
    if axes > _MOST_AXES:
        raise CheckpointError(f"{file}: {name}: found {axes} axes, expected at most {_MOST_AXES}")
    shape = cursor.numbers("Q", axes)[::-1]  # the fastest axis is named first
    return name, cursor.number("I"), shape, cursor.number("Q")


def _sized(file: Path, name: str, kind: int, shape: tuple[int, ...], start: int) -> tuple[Any, ...]:
    """The name of a type, the shape, the first byte, and how many bytes a tensor has."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise CheckpointError(f"{file}: found a GGUF file, expected gguf to read it: pip install gguf") from error
    if kind not in {int(known) for known in GGMLQuantizationType}:
        raise CheckpointError(f"{file}: {name}: found ggml's type {kind}, expected one that gguf knows: update gguf")
    found = GGMLQuantizationType(kind)
    elements, size = GGML_QUANT_SIZES[found]
    columns = shape[-1] if shape else 1
    if columns % elements:
        expected = f"a multiple of {elements} in {found.name}"
        raise CheckpointError(f"{file}: {name}: found {columns} columns, expected {expected}")
    return found.name, shape, start, math.prod(shape) // elements * size
