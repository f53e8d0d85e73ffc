"""What is asked of dense weights, and of the code around their modules, before they are quantised."""

import inspect
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import EXACT_EXPONENTS
from marlin_w4a16.modules.swaps import Places
from marlin_w4a16.producers.found import NO_VALUES, holds_values


def is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor is dense and of no subclass but nn.Parameter."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided  # type: ignore[union-attr]


def dense_refusal(module: nn.Module, name: str) -> str | None:
    """Why a parameter of a module cannot be quantised, shape and values apart, or None."""
    if name not in module._parameters:
        return f"its {name} is computed, by a parametrisation or a hook"
    weight = module._parameters[name]
    if weight is None:
        return f"it has no {name}"
    if type(weight) is not nn.Parameter or not is_plain(weight):
        return f"its {name} is of {type(weight).__name__}, no plain parameter"
    if weight.dtype not in EXACT_EXPONENTS:
        return f"its {name} is {weight.dtype}, expected one of {', '.join(map(str, EXACT_EXPONENTS))}"
    return None if holds_values(weight) else NO_VALUES.reason


def lost_with(module: nn.Module, kept: Sequence[str], packed: str) -> str | None:
    """Why a module cannot become a packed one: it holds parameters, buffers or modules beside those that are kept."""
    more = [*module._parameters, *module._buffers, *module._modules]
    lost = ", ".join(name for name in more if name not in kept)
    return f"it also holds {lost}, which a {packed} would lose" if lost else None


def read_outside(places: Places, names: Sequence[str], why: str, held: Sequence[str] = ()) -> str | None:
    """Why a module cannot become a packed one: a parent reads ``self.child.name``.

    Reading no more of it than what is ``held`` by the packed module's too is left out, such as its dtype.
    """
    found = ((_reader(type(parent), child, name, held), name) for parent, child in places for name in names)
    return next((f"{method} reads its {name}, {why}" for method, name in found if method is not None), None)


def _reader(cls: type[nn.Module], child: str, name: str, held: Sequence[str]) -> str | None:
    """The method of a class that reads ``self.child.name``, or None; what only initialises is left out.

    `nn.MultiheadAttention` has one, Bloom and Mamba of transformers too. T5's asks first whether it is a tensor.
    """
    for owner in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method, value in vars(owner).items():
            function: Any = inspect.unwrap(value) if callable(value) else getattr(value, "fget", None)
            code = getattr(function, "__code__", None)
            if code is None or not {child, name} <= set(code.co_names) or "init" in method or "reset" in method:
                continue
            try:
                source = inspect.getsource(function)
            except OSError:  # made at run time
                continue
            read = rf"self\.{re.escape(child)}\.{re.escape(name)}\b" + "".join(rf"(?!\.{what}\b)" for what in held)
            if re.search(read, source) and not re.search(rf"isinstance\({read}", source):
                return f"{owner.__name__}.{method}"
    return None
