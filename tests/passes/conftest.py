import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from marlin_w4a16.passes.constants import Constants, find_constants


@pytest.fixture
def trace() -> Callable[..., tuple[fx.GraphModule, list[Any]]]:
    """Returns what a backend is called with for ``function(*args)``: a graph and its live inputs."""

    def traced(function: Callable[..., Any], *args: Any) -> tuple[fx.GraphModule, list[Any]]:
        calls: list[tuple[fx.GraphModule, list[Any]]] = []

        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            calls.append((gm, inputs))
            return gm.forward

        torch.compile(function, backend=backend, fullgraph=True)(*args)
        (call,) = calls
        return call

    return traced


@pytest.fixture
def last_sum(trace) -> Callable[..., tuple[fx.Node, fx.Node, Constants, list[Any]]]:
    """For a function that ends in ``x + value``: the sum, the value, the constants and the inputs of its graph."""

    def parts(function: Callable[..., Any], *args: Any) -> tuple[fx.Node, fx.Node, Constants, list[Any]]:
        gm, inputs = trace(function, *args)
        total = next(n for n in reversed(gm.graph.nodes) if n.target is operator.add)
        return total, total.args[1], find_constants(gm.graph), inputs

    return parts
