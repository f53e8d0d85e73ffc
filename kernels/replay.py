"""Calls that are made again: what was launched for some shapes is kept, and started again with other addresses.

To find a launch, look at each of its arguments and make descriptors takes Triton and Python ten times as long as the
driver takes to start it. All of that depends on what a call's key tells (shapes, dtypes, formats, the device), but for
the addresses of tensors. So a call runs in the general way once, and is recorded; from then on it is replayed.
"""

import inspect
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16.kernels.private import (
    Encoding,
    Launcher,
    current_device,
    descriptors_of,
    empty,
    encoding_of,
    hooked,
    is_known,
    launcher,
    raw_stream,
    tensor_map,
)

ALIGNED = 16  # bytes on whose grid the tensors of a call stand: what kernels are specialised for
_SCRATCH = 256  # and those that are made in it
_MOST = 4096  # calls that are kept

_recording = threading.local()
_address_of = Tensor.data_ptr


def submit(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, which a recording sees."""
    compiled = kernel[grid](*arguments, **options)
    recording: Recording | None = getattr(_recording, "current", None)
    if recording is not None:
        recording.add(kernel, compiled, grid, arguments, options)


def scratch(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for the time of a call, which a recording sees."""
    made = torch.empty(shape, dtype=dtype, device=device)
    recording: Recording | None = getattr(_recording, "current", None)
    if recording is not None:
        recording.scratch.append(made)
    return made


class Replay:
    """A call that was recorded.

    Args:
        launches: what it starts, in order.
        sizes: bytes of its scratch tensors.
        known: addresses, by their places, that are those of every call. Places are those of the arguments, in the order
            of the recording, then those of the scratch tensors.
    """

    __slots__ = ("_bytes", "_launches", "_offsets", "_sizes", "_starts", "device")

    def __init__(
        self, launches: Sequence["_Launch"], sizes: Sequence[int], known: Mapping[int, int], device: int
    ) -> None:
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


class Replays:
    """The recorded calls of an op, by keys that tell all of a call but addresses."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Replay | None] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Replay | None:
        """The call of a key, or None."""
        return self._held.get(key)

    def run(self, key: Hashable, tensors: Sequence[Tensor]) -> bool:
        """Replays a call with these tensors; False if there is none with this key, or it does not fit them."""
        replay = self._held.get(key)
        if replay is None:
            return False
        addresses = tuple(map(_address_of, tensors))
        if reduce(or_, addresses) % ALIGNED or replay.device != current_device() or hooked():
            return False
        replay(addresses)
        return True

    def record(self, key: Hashable, tensors: Sequence[Tensor], call: Callable[[], object]) -> None:
        """Runs a call in the general way, and keeps it if it is nothing but launches on its tensors.

        Args:
            key: of the call, that of its device among others; None if it is not to be kept.
            tensors: its arguments and its result, on one CUDA device, in the order in which `run` will be given them.
            call: writes the result.
        """
        with torch.cuda.device(tensors[0].device):
            aligned = not any(tensor.data_ptr() % ALIGNED for tensor in tensors)
            if key is None or key in self._held or hooked() or not aligned:
                call()
                return
            recording = Recording(tensors)
            with recording.on():
                call()
            replay = recording.replay()
        with self._lock:
            if len(self._held) >= _MOST:
                del self._held[next(iter(self._held))]
            self._held[key] = replay


class Recording:
    """What one call launches.

    Args:
        tensors: its arguments and its result.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._launched: list[tuple[Any, Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
        self._watch = _Watch()
        self.scratch: list[Tensor] = []

    def add(self, *launched: Any) -> None:
        """Notes a launch."""
        self._launched.append(launched)

    @contextmanager
    def on(self) -> Any:
        """While it is entered, launches of this thread are noted."""
        _recording.current = self
        try:
            with self._watch:
                yield
        finally:
            _recording.current = None

    def replay(self) -> Replay | None:
        """The call, to be made again; None if not all that it does is known."""
        addresses = [tensor.data_ptr() for tensor in (*self._tensors, *self.scratch)]
        places = {address: place for place, address in enumerate(addresses)}
        told_apart = len(places) == len(addresses) and all(addresses)
        if not (told_apart and self._launched and self._watch.harmless):
            return None
        try:
            launches = [_Launch(*launched, places=places) for launched in self._launched]
        except KeyError:
            return None
        if not all(launch.known for launch in launches):
            return None
        return Replay(launches, [t.numel() * t.element_size() for t in self.scratch], {}, current_device())


class _Watch(TorchDispatchMode):
    """Sees operators that compute something, of which a recording knows nothing."""

    harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.harmless &= func.is_view or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.detach)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class _Address:
    """An argument that is the address at a place, or with an encoding a descriptor of what stands there."""

    place: int
    encoding: Encoding | None = None


class _Launch:
    """A kernel that was launched.

    Args:
        kernel, compiled, grid, arguments, options: the kernel, what it was compiled to, and what it was given.
        places: of the addresses that are known.

    Raises:
        KeyError: an argument stands at an address that is none of them.
    """

    def __init__(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        places: Mapping[int, int],
    ) -> None:
        self._compiled, self._grid, self._count, self._values = compiled, grid, len(places), list[Any]()
        self.known = is_known(compiled)
        names = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = inspect.signature(kernel.fn).bind(*arguments, **names)
        bound.apply_defaults()
        encodings = iter(descriptors_of(compiled))
        for value in bound.arguments.values():
            if isinstance(value, Tensor):
                self._values.append(_Address(places[value.data_ptr()]))
            elif hasattr(value, "block_shape"):
                shape, strides = tuple(value.shape), tuple(value.strides)
                encoding = encoding_of(next(encodings), shape, strides)
                self._values += [_Address(places[value.base.data_ptr()], encoding), *shape, *strides]
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
        run = launcher(self._compiled, self._grid, pick, tuple(constants))
        if not maps:
            return run
        if len(maps) == 1:
            ((at, encoding),) = maps
            return lambda stream, addresses: run(stream, (*addresses, tensor_map(addresses[at], encoding)))
        return lambda stream, addresses: run(
            stream, (*addresses, *[tensor_map(addresses[at], encoding) for at, encoding in maps])
        )
