"""Where the inputs of a graph come from, and their dtypes, in names for people."""

import re

import torch

_STEP = re.compile(r"\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")
_PLUMBING = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})

# The packages of producers whose tensors have classes of their own.
_PRODUCERS = {"modelopt": "ModelOpt", "torchao": "torchao"}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module."""
    return str(dtype).removeprefix("torch.")


def producer_of(value: object) -> str | None:
    """Who made a tensor, told by its class."""
    return _PRODUCERS.get(type(value).__module__.partition(".")[0])


def module_path(source: str) -> str:
    """``L['self']._modules['fc']._buffers['scale']`` as ``fc.scale``; a name without steps is returned as it is.

    A parameter in a subclass of dict is read by position, ``dict.__getitem__(..., list(...)[0])`` (NVIDIA ModelOpt's
    are): the path is then that of its module.
    """
    owner, _, _ = source.removeprefix("dict.__getitem__(").partition(", list(")
    steps = [next(filter(None, step)) for step in _STEP.findall(owner)]
    steps = [step for step in steps if step not in _PLUMBING]
    return ".".join(steps[1:] or steps) or source  # the first step is the local or global that holds the model
