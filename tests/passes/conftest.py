from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx


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
