"""What was launched, as it can be launched again with other addresses."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

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


class Operand(NamedTuple):
    """A scratch tensor that cuBLAS reads or writes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class Product(NamedTuple):
    """``out = a @ b`` by cuBLAS, of operands by their places among those of a call."""

    a: int
    b: int
    out: int


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` of 16 bits by cuBLAS into float32 ``out``."""
    torch.mm(a, b, out_dtype=torch.float32, out=out)


class Replay:
    """A call that was recorded.

    Args:
        steps: what it starts, in order.
        sizes: bytes of its scratch tensors but for operands.
        operands: the others.
        known: addresses, by their places, that are those of every call. Places are those of the arguments, in the order
            of the recording, then those of the scratch tensors, operands last.
        device: where it runs.
    """

    __slots__ = ("_bytes", "_offsets", "_operands", "_sizes", "_stages", "_steps", "device")

    def __init__(
        self,
        steps: Sequence[Launch | Product],
        sizes: Sequence[int],
        operands: Sequence[Operand],
        known: Mapping[int, int],
        device: int,
    ) -> None:
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // _SCRATCH) * _SCRATCH)
        self._steps, self._sizes, self._operands, self.device = tuple(steps), tuple(sizes), tuple(operands), device
        self._offsets, self._bytes = tuple(ends[:-1]), ends[-1]
        stages: list[tuple[list[Launcher], Product | None]] = [([], None)]
        for step in steps:
            if isinstance(step, Launch):
                stages[-1][0].append(step.launcher(known))
            else:
                stages[-1] = stages[-1][0], step
                stages.append(([], None))
        self._stages = tuple((tuple(starts), multiplied) for starts, multiplied in stages)

    def __call__(self, addresses: tuple[int, ...]) -> None:
        """Starts it on the current device, which is its own.

        Args:
            addresses: of its arguments but for those that are known; all on the grid of `ALIGNED` bytes.
        """
        if self._bytes:
            memory = empty((self._bytes,), (1,), torch.uint8)
            base = memory.data_ptr()
            addresses = (*addresses, *[base + offset for offset in self._offsets])
        if self._operands:
            made = [empty(*operand) for operand in self._operands]
            addresses = (*addresses, *[tensor.data_ptr() for tensor in made])
        stream = raw_stream(self.device)
        for starts, multiplied in self._stages:
            for start in starts:
                start(stream, addresses)
            if multiplied is not None:
                product(*[made[at] for at in multiplied])

    def bind(self, known: Mapping[int, Tensor]) -> "Replay | None":
        """The same call where some of its arguments, by their places, stay where they are; None if off the grid."""
        addresses = {place: tensor.data_ptr() for place, tensor in known.items()}
        if any(address % ALIGNED for address in addresses.values()):
            return None
        return Replay(self._steps, self._sizes, self._operands, addresses, self.device)
