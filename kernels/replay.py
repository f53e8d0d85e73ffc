"""What was launched, as it can be launched again with other addresses."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.private import (
    Encoding,
    Launcher,
    descriptors_of,
    empty,
    encoding_of,
    launcher,
    raw_stream,
    tensor_map,
)

ALIGNED = 16  # bytes on whose grid the tensors of a call stand: what kernels are specialised for
_SCRATCH = 256  # and those that are made in it


@dataclass(frozen=True, slots=True)
class _Address:
    """An argument that is the address at a place, or with an encoding a descriptor of what stands there."""

    place: int
    encoding: Encoding | None = None


class Launch:
    """A kernel that was launched.

    Args:
        kernel, compiled, grid, arguments, options: the kernel, what it was compiled to, and what it was given.
        count: of the addresses that it may be given.
        place_of: which of them is that of a tensor.

    Raises:
        KeyError: ``place_of`` does not know a tensor.
    """

    def __init__(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        count: int,
        place_of: Callable[[Tensor], int],
    ) -> None:
        self._compiled, self._grid, self._count, self._values = compiled, grid, count, list[Any]()
        names = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = inspect.signature(kernel.fn).bind(*arguments, **names)
        bound.apply_defaults()
        encodings = iter(descriptors_of(compiled))
        for value in bound.arguments.values():
            if isinstance(value, Tensor):
                self._values.append(_Address(place_of(value)))
            elif hasattr(value, "block_shape"):
                shape, strides = tuple(value.shape), tuple(value.strides)
                encoding = encoding_of(next(encodings), shape, strides)
                self._values += [_Address(place_of(value.base), encoding), *shape, *strides]
            else:
                self._values.append(value)

    def launcher(self, known: Mapping[int, int]) -> Launcher:
        """What launches it for the addresses that are not known."""
        free = {place: at for at, place in enumerate(p for p in range(self._count) if p not in known)}
        constants, maps, places = list[Any](), list[tuple[int, Encoding]](), list[tuple[int, int]]()
        for value in self._values:
            if isinstance(value, _Address) and value.place in free:
                if value.encoding is None:
                    places.append((0, free[value.place]))
                else:
                    places.append((1, len(maps)))
                    maps.append((free[value.place], value.encoding))
                continue
            if isinstance(value, _Address):
                address = known[value.place]
                value = address if value.encoding is None else tensor_map(address, value.encoding)
            places.append((2, len(constants)))
            constants.append(value)
        begins = 0, len(free), len(free) + len(maps)
        pick = itemgetter(*(begins[kind] + at for kind, at in places))
        return launcher(self._compiled, self._grid, pick, tuple(maps), tuple(constants))


class Replay:
    """A call that was recorded.

    Args:
        launches: what it starts, in order.
        sizes: bytes of its scratch tensors.
        known: addresses, by their places, that are those of every call. Places are those of the arguments, in the order
            of the recording, then those of the scratch tensors.
    """

    __slots__ = ("_bytes", "_launches", "_offsets", "_sizes", "_starts", "device")

    def __init__(self, launches: Sequence[Launch], sizes: Sequence[int], known: Mapping[int, int], device: int) -> None:
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // _SCRATCH) * _SCRATCH)
        self._launches, self._sizes, self.device = tuple(launches), tuple(sizes), device
        self._offsets, self._bytes = tuple(ends[:-1]), ends[-1]
        self._starts = tuple([launch.launcher(known) for launch in launches])

    def __call__(self, addresses: tuple[int, ...]) -> None:
        """Starts it on the current device, which is its own.

        Args:
            addresses: of its arguments but for those that are known; all on the grid of `ALIGNED` bytes.
        """
        if self._bytes:
            made = empty((self._bytes,), (1,), torch.uint8)
            base = made.data_ptr()
            addresses = (*addresses, *[base + offset for offset in self._offsets])
        stream = raw_stream(self.device)
        for start in self._starts:
            start(stream, addresses)

    def bind(self, known: Mapping[int, int]) -> "Replay":
        """The same call where some of its arguments, by their places, stay where they are."""
        return Replay(self._launches, self._sizes, known, self.device)
