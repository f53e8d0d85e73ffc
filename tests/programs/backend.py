"""The backend, run as a user runs it, with what it logged."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn

from marlin_w4a16.report.data import Report


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def through_backend(
    module: nn.Module, inputs: tuple[Tensor, ...], *, inductor: bool = False, **options: object
) -> tuple[Tensor, str]:
    """The output of a module through the backend, and the one line of its log.

    What the pass made of the graph runs eagerly, unless ``inductor`` is asked for: that takes seconds.
    """
    torch._dynamo.reset()
    handler, log = _Lines(), logging.getLogger("marlin_w4a16")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    eagerly = patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward)
    try:
        with nullcontext() if inductor else eagerly:
            output = torch.compile(module, backend="marlin_w4a16", fullgraph=True, options=options or None)(*inputs)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    (line,) = handler.lines
    return output, line


def reported(module: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options: object) -> tuple[Tensor, Report]:
    """The output of a module through the backend, without Inductor, and the report of its graph."""
    torch._dynamo.reset()
    eagerly = patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward)
    with eagerly, patch("marlin_w4a16.backend.publish") as published:
        output = torch.compile(module, backend="marlin_w4a16", fullgraph=True, options=options or None)(*inputs)
    (call,) = published.call_args_list
    return output, call.args[0]
