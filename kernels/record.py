"""Calls that are made again: what was launched for some shapes is kept, and started again with other addresses.

To find a launch, look at each of its arguments and make descriptors takes Triton and Python ten times as long as the
driver takes to start it. All of that depends on what a call's key tells (shapes, dtypes, formats, the device), but for
the addresses of tensors. So a call runs in the general way once, and is recorded; from then on it is replayed.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import count
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16.kernels.private import current_device, hooked, is_known
from marlin_w4a16.kernels.replay import ALIGNED, Launch, Replay

_MOST = 4096  # calls that are kept

_recording = threading.local()
_address_of = Tensor.data_ptr


def submit(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, which a recording sees.

    A kernel of Triton that was launched before with these numbers and dtypes is launched again, without a look at them.
    """
    recording: Recording | None = getattr(_recording, "current", None)
    key = None if recording is not None else _key_of(kernel, grid, arguments, options)
    if key is not None and _LAUNCHES.run(key, [a for a in arguments if isinstance(a, Tensor)]):
        return
    compiled = kernel[grid](*arguments, **options)
    if recording is not None:
        recording.add(kernel, compiled, grid, arguments, options)
    elif key is not None and not hooked():
        _LAUNCHES.keep(key, _alone(kernel, compiled, grid, arguments, options))


def _key_of(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> Hashable | None:
    first = arguments[0]
    if not (isinstance(first, Tensor) and first.is_cuda) or kernel.is_gluon():  # whose descriptors have no hash
        return None
    told = [a.dtype if isinstance(a, Tensor) else a for a in arguments]
    return (id(kernel), first.get_device(), grid, *told, *options.items())


def _alone(
    kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Replay | None:
    """One launch as a call on its tensors, each with a place of its own, whether or not they are one."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    if not is_known(compiled) or any(t.data_ptr() % ALIGNED for t in tensors):
        return None
    places = count()
    launch = Launch(kernel, compiled, grid, arguments, options, len(tensors), lambda tensor: next(places))
    return Replay([launch], (), {}, tensors[0].get_device())


def scratch(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for the time of a call, which a recording sees."""
    made = torch.empty(shape, dtype=dtype, device=device)
    recording: Recording | None = getattr(_recording, "current", None)
    if recording is not None:
        recording.scratch.append(made)
    return made


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
            self.keep(key, recording.replay())

    def keep(self, key: Hashable, replay: Replay | None) -> None:
        """Keeps a call, or that it cannot be kept."""
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
        known = all(is_known(compiled) for _, compiled, *_ in self._launched)
        if not (told_apart and known and self._launched and self._watch.harmless):
            return None
        try:
            place_of = lambda tensor: places[tensor.data_ptr()]  # noqa: E731
            launches = [Launch(*launched, len(places), place_of) for launched in self._launched]
        except KeyError:
            return None
        return Replay(launches, [t.numel() * t.element_size() for t in self.scratch], {}, current_device())


class _Watch(TorchDispatchMode):
    """Sees operators that compute something, of which a recording knows nothing."""

    harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.harmless &= func.is_view or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.detach)
        return func(*args, **(kwargs or {}))


_LAUNCHES = Replays()
