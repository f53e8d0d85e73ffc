"""Names for people from the expressions by which Dynamo reads its inputs."""

import re

_STEP = re.compile(r"\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")
_PLUMBING = frozenset({"_modules", "_parameters", "_buffers", "__dict__"})


def module_path(source: str) -> str:
    """``L['self']._modules['fc']._buffers['scale']`` as ``fc.scale``; a name without steps is returned as it is.

    A parameter in a subclass of dict is read by position, ``dict.__getitem__(..., list(...)[0])`` (NVIDIA ModelOpt's
    are): the path is then that of its module.
    """
    owner, _, _ = source.removeprefix("dict.__getitem__(").partition(", list(")
    steps = [next(filter(None, step)) for step in _STEP.findall(owner)]
    steps = [step for step in steps if step not in _PLUMBING]
    return ".".join(steps[1:] or steps) or source  # the first step is the local or global that holds the model
