"""Whether a module whose forward is its own computes what ``nn.Linear`` computes."""

import dis
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.producers.found import is_linear
from marlin_w4a16.quantize.dense import is_near

# All that the forward of such a module may mention, beside numbers of the module that are the sizes of its weight.
_WORDS = {
    "weight", "bias", "T", "mT", "t", "transpose", "torch", "nn", "functional", "F", "linear", "matmul", "mm", "addmm",
    "size", "shape", "view", "reshape", "flatten", "contiguous", "super", "forward", "Tensor",
}  # fmt: skip


def is_product(module: Any) -> bool:
    """Whether a module may compute ``x @ weight.T + bias`` or ``x @ weight + bias``, by the words of its forward."""
    if is_linear(type(module)):
        return True
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2 or not isinstance(module._parameters.get("bias"), Tensor | None):
        return False
    sizes = {name for name, value in vars(module).items() if type(value) is int and value in weight.shape}
    codes = list(_codes(type(module)))
    return bool(codes) and all(_is_plain(code, _WORDS | sizes) for code in codes)


def is_transposed(module: Any) -> bool | None:
    """Whether the weight stands as ``[k, n]``, told by running the module; None: it computes something else."""
    if is_linear(type(module)):
        return False
    weight, bias = module.weight.detach(), module.bias
    for transposed in (False, True):
        stored = weight.mT if transposed else weight
        x = torch.randn((2, 3, stored.shape[1]), generator=torch.Generator().manual_seed(0)).to(weight)
        try:
            with torch.no_grad():
                found, expected = module.forward(x), nn.functional.linear(x, stored, bias)
        except Exception:  # whatever a module's own code raises
            continue
        if is_near(found, expected):
            return transposed
    return None


def _codes(cls: type[nn.Module]) -> Iterator[CodeType | None]:
    """Of each forward that a class has or inherits, up to that of nn.Linear."""
    for owner in cls.__mro__:
        if owner in (nn.Linear, nn.Module):
            return
        if "forward" in vars(owner):
            yield getattr(vars(owner)["forward"], "__code__", None)


def _is_plain(code: CodeType | None, words: set[str]) -> bool:
    """One input, no other words, nothing compared, no loop, no function within."""
    if code is None or (code.co_argcount, code.co_kwonlyargcount) != (2, 0) or code.co_flags & 0x0C:  # *args, **kwargs
        return False
    within = any(isinstance(constant, CodeType) for constant in code.co_consts)
    steps = {step.opname for step in dis.get_instructions(code)}
    closed = set(code.co_freevars) <= {"__class__"}
    return closed and not within and set(code.co_names) <= words and not steps & {"COMPARE_OP", "FOR_ITER"}
