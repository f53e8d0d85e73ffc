"""Calls that are made again: what was launched for some shapes is kept, and started again with other addresses.

To find a launch, look at each of its arguments and make descriptors takes Triton and Python ten times as long as the
driver takes to start it. All of that depends on what a call's key tells (shapes, dtypes, formats, the device), but for
the addresses of tensors. So a call runs in the general way once, and is recorded; from then on it is replayed.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16.kernels.private import (
    Launcher,
    current_device,
    descriptors_of,
    empty,
    encoding_of,
    hooked,
    launcher,
    raw_stream,
    tensor_map,
)

ALIGNED = 16  # bytes on whose grid the tensors of a call stand: what kernels are specialised for
_SCRATCH = 256  # and those that are made in it
_MOST = 4096  # calls that are kept

_recording = threading.local()


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
        launches: what it starts, in order: functions of a stream and of the addresses of all tensors.
        sizes: bytes of its scratch tensors, whose addresses follow those of its arguments.
    """

    __slots__ = ("_bytes", "_launches", "_offsets", "device")

    def __init__(self, launches: Sequence[Launcher], sizes: Sequence[int]) -> None:
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // _SCRATCH) * _SCRATCH)
        self._launches, self.device = tuple(launches), current_device()
        self._offsets, self._bytes = tuple(ends[:-1]), ends[-1]

    def __call__(self, addresses: tuple[int, ...]) -> None:
        """Starts it.

        Args:
            addresses: of its tensors, in the order of the recording; all on the grid of `ALIGNED` bytes.
        """
        if self._bytes:
            made = empty((self._bytes,), (1,), torch.uint8)
            base = made.data_ptr()
            addresses += tuple([base + offset for offset in self._offsets])
        stream = raw_stream(self.device)
        for start in self._launches:
            start(stream, addresses)


class Replays:
    """The recorded calls of an op, by keys that tell all of a call but addresses."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Replay | None] = {}
        self._lock = threading.Lock()

    def run(self, key: Hashable, tensors: Sequence[Tensor]) -> bool:
        """Replays a call with these tensors; False if there is none with this key, or it does not fit them."""
        replay = self._held.get(key)
        if replay is None:
            return False
        addresses = tuple([tensor.data_ptr() for tensor in tensors])
        if functools.reduce(or_, addresses) % ALIGNED or replay.device != current_device() or hooked():
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
        starts = [_start(*launched, places=places) for launched in self._launched]
        if None in starts:
            return None
        return Replay([start for start in starts if start], [t.numel() * t.element_size() for t in self.scratch])


class _Watch(TorchDispatchMode):
    """Sees operators that compute something, of which a recording knows nothing."""

    harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.harmless &= func.is_view or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.detach)
        return func(*args, **(kwargs or {}))


def _start(
    kernel: Any,
    compiled: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    places: dict[int, int],
) -> Launcher | None:
    """A launch that is given addresses; None if it is not known how, or reads what is not known."""
    try:
        values, maps = _flat(kernel, compiled, arguments, options, places)
    except KeyError:
        return None
    constants = tuple(value for value in values if not isinstance(value, _Place))
    first = len(places) + len(maps)
    rest = iter(range(first, first + len(constants)))
    pick = itemgetter(*(value.at if isinstance(value, _Place) else next(rest) for value in values))
    run = launcher(compiled, grid, pick, constants)
    if run is None or not maps:
        return run

    def start(stream: int, addresses: tuple[int, ...]) -> None:
        run(stream, addresses + tuple([tensor_map(addresses[place], encoding) for place, encoding in maps]))

    return start


class _Place(int):
    """Where the value of an argument stands: an address, or a descriptor behind them."""

    @property
    def at(self) -> int:
        return int(self)


def _flat(
    kernel: Any, compiled: Any, arguments: tuple[Any, ...], options: dict[str, Any], places: dict[int, int]
) -> tuple[list[Any], list[tuple[int, tuple[Any, ...]]]]:
    """The arguments of a kernel in its own order, and the place and encoding of each descriptor.

    Raises:
        KeyError: one of them is at an address that is none of ``places``.
    """
    names = {name: value for name, value in options.items() if name in kernel.arg_names}
    bound = inspect.signature(kernel.fn).bind(*arguments, **names)
    bound.apply_defaults()
    metas, values, maps = iter(descriptors_of(compiled)), [], []
    for value in bound.arguments.values():
        if isinstance(value, Tensor):
            values.append(_Place(places[value.data_ptr()]))
        elif hasattr(value, "block_shape"):
            shape, strides = tuple(value.shape), tuple(value.strides)
            maps.append((places[value.base.data_ptr()], encoding_of(next(metas), shape, strides)))
            values += [_Place(len(places) + len(maps) - 1), *shape, *strides]
        else:
            values.append(value)
    return values, maps
