"""What one call launches and multiplies, noted while it runs, to be made again with other addresses."""

import threading
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16.kernels.private import current_device, is_known
from marlin_w4a16.kernels.replay import Launch, Operand, Product, Replay, product

_thread = threading.local()


def recording() -> "Recording | None":
    """What notes the launches of this thread."""
    current: Recording | None = getattr(_thread, "current", None)
    return current


class _Launched(NamedTuple):
    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Multiplied(NamedTuple):
    a: Tensor
    b: Tensor
    out: Tensor


class Recording:
    """What one call launches and multiplies.

    Args:
        tensors: its arguments and its result.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._steps: list[_Launched | _Multiplied] = []
        self._watch = _Watch()
        self.scratch: list[Tensor] = []

    def add(self, *launched: Any) -> None:
        """Notes a launch."""
        self._steps.append(_Launched(*launched))

    def multiply(self, *operands: Tensor) -> None:
        """Notes a product, and computes it."""
        self._steps.append(_Multiplied(*operands))
        harmless = self._watch.harmless
        product(*operands)
        self._watch.harmless = harmless

    @contextmanager
    def on(self) -> Any:
        """While it is entered, what this thread launches is noted."""
        _thread.current = self
        try:
            with self._watch:
                yield
        finally:
            _thread.current = None

    def replay(self) -> Replay | None:
        """The call, to be made again; None if not all that it does is known."""
        launched = [step for step in self._steps if isinstance(step, _Launched)]
        views = [view for step in self._steps if isinstance(step, _Multiplied) for view in step]
        operands = {view.data_ptr(): _operand(view) for view in views}
        plain = [t for t in self.scratch if t.data_ptr() not in operands]
        whole = [t for t in self.scratch if t.data_ptr() in operands]
        addresses = [t.data_ptr() for t in (*self._tensors, *plain, *whole)]
        places = {address: place for place, address in enumerate(addresses)}
        told_apart = len(places) == len(addresses) and all(addresses)
        # operands are made anew as products see them: all of a scratch tensor, and always in one way
        alike = all(operands[view.data_ptr()] == _operand(view) for view in views)
        alike = alike and len(operands) == len(whole) and all(operands[t.data_ptr()].nbytes == t.nbytes for t in whole)
        known = all(is_known(step.compiled) for step in launched)
        if not (told_apart and alike and known and launched and self._watch.harmless):
            return None
        try:
            steps = [self._step(step, places, len(places) - len(whole)) for step in self._steps]
        except KeyError:
            return None
        made = [operands[t.data_ptr()] for t in whole]
        return Replay(steps, [t.nbytes for t in plain], made, {}, current_device())

    @staticmethod
    def _step(step: _Launched | _Multiplied, places: dict[int, int], operands: int) -> Launch | Product:
        if isinstance(step, _Launched):
            return Launch(*step, len(places), lambda tensor: places[tensor.data_ptr()])
        return Product(*[places[tensor.data_ptr()] - operands for tensor in step])


def _operand(view: Tensor) -> Operand:
    return Operand(tuple(view.shape), view.stride(), view.dtype)


class _Watch(TorchDispatchMode):
    """Sees operators that compute something, of which a recording knows nothing."""

    harmless = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.harmless &= func.is_view or func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.detach)
        return func(*args, **(kwargs or {}))
