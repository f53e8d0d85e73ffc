"""Reads tensors of a checkpoint to a device: many at once, by several threads, straight into one buffer."""

import ctypes
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.gguf_blocks import Blocks, Placed
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.storage import DTYPES

_DTYPES = {
    **DTYPES, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "BOOL": torch.bool,
}  # fmt: skip
_THREADS = min(8, os.cpu_count() or 1)
_BLOCKS = 32 << 20  # bytes of blocks, of which tensors are made, that are there at a time
_PIECE = 4 << 20  # the most bytes of one read: threads share big tensors
_ALONE = 1 << 18  # bytes that are read by the caller's thread: to hand them out takes as long
_ALIGNED = 64  # bytes, of the first byte of a tensor in a buffer of several

_Range = tuple[int, int, int]  # a file's descriptor, the first byte there, and how many


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
        self._device, self._open = device, dict[Path, BinaryIO]()
        self._headers = dict[Path, dict[str, tuple[int, int]]]()
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
        read = iter(self._each([place for place in places if not isinstance(place.entry, Blocks)]))
        found = (self.tensor(*place) if isinstance(place.entry, Blocks) else next(read) for place in places)
        return [{leaf: next(found) for leaf in layer.entries} for layer in layers]

    def stacked(self, places: Sequence[Place], device: torch.device | None = None) -> Tensor:
        """Tensors of one dtype and shape as one, ``[len(places), ...]``.

        Args:
            places: at least one.
            device: where to, if not to that of the reader.

        Raises:
            CheckpointError: a file is not what its header said when it was read.
        """
        device, like = device or self._device, places[0]
        if isinstance(like.entry, Blocks):
            return self._unpacked(places, like.entry, device)
        ranges = [self._range(*place) for place in places]
        return self._bytes(ranges, device).view(_DTYPES[like.entry.dtype]).view(len(places), *like.shape)

    def _each(self, places: Sequence[Place]) -> list[Tensor]:
        """Tensors of any dtypes and shapes, each on its own."""
        ranges = [self._range(*place) for place in places]
        sizes = [-(-nbytes // _ALIGNED) * _ALIGNED for _, _, nbytes in ranges]
        if self._device.type == "cuda":
            buffers = list(torch.split(_buffer(sum(sizes), self._device), sizes))
        else:  # one for each, or what is kept of a layer would keep all
            buffers = [_buffer(size, self._device) for size in sizes]
        buffers = [buffer[:nbytes] for buffer, (_, _, nbytes) in zip(buffers, ranges, strict=True)]
        self._fill([(buffer, [one]) for buffer, one in zip(buffers, ranges, strict=True)])
        return [
            buffer.view(_DTYPES[place.entry.dtype]).view(place.shape).to(self._device)
            for buffer, place in zip(buffers, places, strict=True)
        ]

    def _unpacked(self, places: Sequence[Place], like: Blocks, device: torch.device) -> Tensor:
        """See `stacked`, of what files hold in blocks: some matrices at a time."""
        matrices = [(place.entry, m) for place in places for m in _blocks(place.entry).matrices(place.row)]
        out: Tensor | None = None
        step = max(1, _BLOCKS // max(1, like.matrix_nbytes))
        for at in range(0, len(matrices), step):
            some = matrices[at : at + step]
            ranges = [(self._file(entry.file), *one) for entry, matrix in some for one in matrix]
            part = like.read(self._bytes(ranges, device).view(len(some), like.matrix_nbytes))
            for one, (entry, _) in zip(part, some, strict=True):
                if (order := _blocks(entry).order) is not None:
                    one.copy_(one[order.to(device)])
            out = part.new_empty((len(matrices), *part.shape[1:])) if out is None else out
            out[at : at + step] = part
        assert out is not None
        return out.view(_DTYPES[like.dtype]).view(len(places), *places[0].shape)

    def _bytes(self, ranges: Sequence[_Range], device: torch.device) -> Tensor:
        """Bytes of files, one range after the other."""
        buffer = _buffer(sum(nbytes for _, _, nbytes in ranges), device)
        self._fill([(buffer, ranges)])
        return buffer.to(device)

    def _range(self, entry: Entry, name: str, row: int | None) -> _Range:
        """Where a tensor lies, or a row of it."""
        file = self._file(entry.file)
        if isinstance(entry, Placed):
            start, nbytes = entry.start, entry.nbytes
        else:
            if entry.file not in self._headers:
                self._headers[entry.file] = _places(self._open[entry.file])
            start, nbytes = self._headers[entry.file].get(name, (0, -1))
        if nbytes != entry.nbytes:
            raise CheckpointError(f"{entry.file}: {name}: found another file than before, expected {entry}: load again")
        if row is not None:
            nbytes //= entry.shape[0]
            start += row * nbytes
        return file, start, nbytes

    def _file(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = self.enter_context(path.open("rb"))
        return self._open[path].fileno()

    def _fill(self, given: Sequence[tuple[Tensor, Sequence[_Range]]]) -> None:
        """Fills each buffer with ranges, one after the other."""
        pieces: list[tuple[int, int, memoryview]] = []
        for buffer, ranges in given:
            view, at = memoryview(_memory(buffer)), 0
            for file, start, nbytes in ranges:
                cuts = range(0, nbytes, _PIECE)
                pieces += [(file, start + cut, view[at + cut : at + min(cut + _PIECE, nbytes)]) for cut in cuts]
                at += nbytes

        def read(some: Sequence[tuple[int, int, memoryview]]) -> None:
            for file, offset, view in some:
                _read(file, offset, view)

        if _THREADS == 1 or sum(len(view) for _, _, view in pieces) <= _ALONE:
            read(pieces)
            return
        if self._threads is None:
            self._threads = self.enter_context(ThreadPoolExecutor(_THREADS))
        list(self._threads.map(read, (pieces[first::_THREADS] for first in range(min(_THREADS, len(pieces))))))


def _buffer(size: int, device: torch.device) -> Tensor:
    """Bytes on the CPU, from where they go to a device."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")


def _memory(buffer: Tensor) -> Any:
    """The memory of a tensor on the CPU."""
    return (ctypes.c_ubyte * buffer.numel()).from_address(buffer.data_ptr()) if buffer.numel() else bytearray()


def _blocks(entry: Entry) -> Blocks:
    if not isinstance(entry, Blocks):
        raise TypeError(f"{entry}: found a tensor of its own, expected one in blocks")
    return entry


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
