"""Calls that are made again: what was launched for some shapes is kept, and started again with other addresses.

To find a launch, look at each of its arguments and make descriptors takes Triton and Python ten times as long as the
driver takes to start it. All of that depends on what a call's key tells (shapes, dtypes, formats, the device), but for
the addresses of tensors. So a call runs in the general way once, and is recorded; from then on it is replayed.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from itertools import count
from operator import or_
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.private import current_device, hooked, is_known
from marlin_w4a16.kernels.recording import Recording, recording
from marlin_w4a16.kernels.replay import ALIGNED, Launch, Replay, product

_MOST = 4096  # calls that are kept

_address_of = Tensor.data_ptr


def submit(kernel: Any, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``, which a recording sees.

    A kernel of Triton that was launched before with these numbers and dtypes is launched again, without a look at them.
    """
    current = recording()
    key = None if current is not None else _key_of(kernel, grid, arguments, options)
    if key is not None and _LAUNCHES.run(key, [a for a in arguments if isinstance(a, Tensor)]):
        return
    # products and sums become one instruction: from Triton 3.10 on that has to be asked for
    compiled = kernel[grid](*arguments, enable_fp_fusion=True, **options)
    if current is not None:
        current.add(kernel, compiled, grid, arguments, options)
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
    return Replay([launch], (), (), {}, tensors[0].get_device())


def scratch(shape: tuple[int, ...] | int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty tensor for the time of a call, which a recording sees."""
    made = torch.empty(shape, dtype=dtype, device=device)
    current = recording()
    if current is not None:
        current.scratch.append(made)
    return made


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` of 16 bits by cuBLAS into float32 ``out``, which a recording sees."""
    current = recording()
    if current is None:
        product(a, b, out)
    else:
        current.multiply(a, b, out)


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
            seen = Recording(tensors)
            with seen.on():
                call()
            self.keep(key, seen.replay())

    def keep(self, key: Hashable, replay: Replay | None) -> None:
        """Keeps a call, or that it cannot be kept."""
        with self._lock:
            if len(self._held) >= _MOST:
                del self._held[next(iter(self._held))]
            self._held[key] = replay


_LAUNCHES = Replays()
