"""What holds while a program runs, in eager and compiled alike."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


def _autocast() -> AbstractContextManager[object]:
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast("cpu", torch.bfloat16))
    return stack


@dataclass(frozen=True, slots=True)
class Setting:
    """One of them.

    Attributes:
        context: entered for each call.
        dynamic: compiled for any number of rows.
        gradients: inputs of float32 want some.
    """

    context: Callable[[], AbstractContextManager[object]] = torch.no_grad
    dynamic: bool | None = None
    gradients: bool = False

    def prepared(self, call: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs as this setting has them."""
        return call


SETTINGS = {
    "plain": Setting(),
    "autocast": Setting(_autocast),
    "inference mode": Setting(torch.inference_mode),
    "gradients": Setting(contextlib.nullcontext, gradients=True),
    "dynamic shapes": Setting(dynamic=True),
    "default dtype float64": Setting(lambda: _default_dtype(torch.float64)),
    "default dtype bfloat16": Setting(lambda: _default_dtype(torch.bfloat16)),
}


def setting_of(random: Random) -> str:
    """Mostly the plain one."""
    return "plain" if random.random() < 0.75 else random.choice(list(SETTINGS))
