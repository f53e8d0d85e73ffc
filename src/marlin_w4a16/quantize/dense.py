"""What is asked of dense weights, and of the code around their modules, before they are quantised."""

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import EXACT_EXPONENTS
from marlin_w4a16.producers.found import NO_VALUES, holds_values
from marlin_w4a16.quantize.readers import Readers


def is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor is dense and of no subclass but nn.Parameter."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided  # type: ignore[union-attr]


def is_near(found: Any, expected: Tensor) -> bool:
    """Whether what a module gives is what it is thought to compute, up to roundings of its dtype."""
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    size = float(expected.double().nan_to_num(0, 0, 0).abs().amax()) if expected.numel() else 0.0
    rtol = 8 * torch.finfo(expected.dtype).eps ** 0.75
    return torch.allclose(found.double(), expected.double(), rtol=rtol, atol=rtol * size, equal_nan=True)


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


def read_outside(
    readers: Readers, module: nn.Module, names: Sequence[str], why: str, held: Sequence[str] = ()
) -> str | None:
    """Why a module cannot become a packed one: code that a call of the model runs reads a parameter of it.

    Reading no more of it than what is ``held`` by the packed module's too is left out, such as its dtype.
    `nn.MultiheadAttention` has such code, Bloom and Mamba of transformers too.
    """
    found = readers.reads(module, names, held)
    return None if found is None else f"{found[0]} reads its {found[1]}, {why}"
