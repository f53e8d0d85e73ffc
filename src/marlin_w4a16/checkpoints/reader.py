"""Reads tensors of a checkpoint to a device: many at once, by several threads, straight into one buffer."""

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.storage import DTYPES

_DTYPES = {
    **DTYPES, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool,
}  # fmt: skip
_THREADS = min(8, os.cpu_count() or 1)
_PIECE = 4 << 20  # the most bytes of one read: threads share big tensors
_ALONE = 1 << 18  # bytes that are read by the caller's thread: to hand them out takes as long
_ALIGNED = 64  # bytes, of the first byte of a tensor in a buffer of several

_Piece = tuple[int, int, int]  # a file's descriptor, an offset there, and how many bytes


class Place(NamedTuple):
    """Where a tensor lies: its entry, its name, and which row of its first axis, or None: it is all."""

    entry: Entry
    name: str
    row: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.entry.shape if self.row is None else self.entry.shape[1:]


class Reader(ExitStack):
    """Reads tensors of a checkpoint to a device; a context, for whose length their files stay open."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._open = device, dict[Path, tuple[int, dict[str, tuple[int, int]]]]()
        self._threads: ThreadPoolExecutor | None = None

    def tensor(self, entry: Entry, name: str, index: int | None = None) -> Tensor:
        """A tensor, or what it holds at an index of its first axis."""
        return self.stacked([Place(entry, name, index)])[0]

    def tensors(self, layers: Sequence[Layer]) -> list[dict[str, Tensor]]:
        """The tensors of some layers by leaf: read at once, so that threads have more to share.

        Raises:
            CheckpointError: see `stacked`.
        """
        places = [Place(entry, layer.name(leaf)) for layer in layers for leaf, entry in layer.entries.items()]
        sizes = [-(-entry.nbytes // _ALIGNED) * _ALIGNED for entry, *_ in places]
        if self._device.type == "cuda":
            buffers = list(torch.split(self._buffer(sum(sizes), self._device), sizes))
        else:  # one each, or what is kept of a layer would keep all
            buffers = [self._buffer(size, self._device) for size in sizes]
        buffers = [buffer[: entry.nbytes] for buffer, (entry, *_) in zip(buffers, places, strict=True)]
        self._fill([(buffer, [place]) for buffer, place in zip(buffers, places, strict=True)])
        found = (
            buffer.view(_DTYPES[entry.dtype]).view(entry.shape).to(self._device)
            for buffer, (entry, *_) in zip(buffers, places, strict=True)
        )
        return [{leaf: next(found) for leaf in layer.entries} for layer in layers]

    def stacked(self, places: Sequence[Place], device: torch.device | None = None) -> Tensor:
        """Tensors of one dtype and shape as one, ``[len(places), ...]``.

        Args:
            places: at least one.
            device: where to, if not to that of the reader.

        Raises:
            CheckpointError: a file is not what its header said when it was read.
        """
        device, (like, _, row) = device or self._device, places[0]
        each = like.nbytes // (1 if row is None else like.shape[0])
        buffer = self._buffer(len(places) * each, device)
        self._fill([(buffer, places)])
        return buffer.view(_DTYPES[like.dtype]).view(len(places), *places[0].shape).to(device)

    def _buffer(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")

    def _fill(self, given: Sequence[tuple[Tensor, Sequence[Place]]]) -> None:
        """Fills each buffer with what lies at places, one after the other."""
        pieces: list[tuple[memoryview, _Piece]] = []
        for buffer, places in given:
            view, at = memoryview(_bytes(buffer)), 0
            for piece in self._pieces(places):
                pieces.append((view[at : at + piece[2]], piece))
                at += piece[2]

        def read(some: Sequence[tuple[memoryview, _Piece]]) -> None:
            for view, (file, offset, _) in some:
                _read(file, offset, view)

        if _THREADS == 1 or sum(len(view) for view, _ in pieces) <= _ALONE:
            read(pieces)
            return
        if self._threads is None:
            self._threads = self.enter_context(ThreadPoolExecutor(_THREADS))
        list(self._threads.map(read, (pieces[first::_THREADS] for first in range(min(_THREADS, len(pieces))))))

    def _pieces(self, places: Sequence[Place]) -> Iterator[_Piece]:
        """Files, offsets and bytes of what is read, in order."""
        for entry, name, row in places:
            file, start, nbytes = self._find(entry, name)
            if row is not None:
                nbytes //= entry.shape[0]
                start += row * nbytes
            for at in range(0, nbytes, _PIECE):
                yield file, start + at, min(_PIECE, nbytes - at)

    def _find(self, entry: Entry, name: str) -> tuple[int, int, int]:
        """The file of a tensor, and its first byte and their number there."""
        if entry.file not in self._open:
            file = self.enter_context(entry.file.open("rb"))
            self._open[entry.file] = file.fileno(), _places(file)
        descriptor, found = self._open[entry.file]
        start, nbytes = found.get(name, (0, -1))
        if nbytes != entry.nbytes:
            raise CheckpointError(f"{entry.file}: {name}: found another file than before, expected {entry}: load again")
        return descriptor, start, nbytes


def _bytes(buffer: Tensor) -> Any:
    """The memory of a tensor on the CPU."""
    return (ctypes.c_ubyte * buffer.numel()).from_address(buffer.data_ptr()) if buffer.numel() else bytearray()


def _read(file: int, offset: int, view: memoryview) -> None:
    while view:
        count = os.preadv(file, [view], offset)
        if not count:
            raise CheckpointError(f"found the end of a file at byte {offset}, expected {len(view)} more: load again")
        view, offset = view[count:], offset + count


def _places(file: BinaryIO) -> dict[str, tuple[int, int]]:
    """The first byte of each tensor of a safetensors file, and how many it has."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    ranges = {name: told["data_offsets"] for name, told in header.items() if name != "__metadata__"}
    return {name: (8 + size + start, stop - start) for name, (start, stop) in ranges.items()}
