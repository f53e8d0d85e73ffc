import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from marlin_w4a16.passes.find.products import find_products
from marlin_w4a16.passes.graph.constants import Constants, find_constants
from marlin_w4a16.passes.graph.regions import Regions
from marlin_w4a16.passes.judge.decode import Decode


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


@pytest.fixture
def decode_of(trace) -> Callable[..., Decode]:
    """Returns what computes ``function(*weights)`` in the graph of ``multiply(x, function(*weights))``.

    Its leaves stand in the order of the weights.
    """

    def decode(
        function: Callable[..., Tensor],
        *weights: Tensor,
        multiply: Callable[..., Tensor] = linear,
        k: int | None = None,
        cls: type = Decode,
    ) -> Decode:
        torch._dynamo.reset()
        module = nn.Module()
        for i, weight in enumerate(weights):
            setattr(module, f"weight_{i}", nn.Buffer(weight))
        with torch.no_grad():
            value = function(*module.buffers())
        x = torch.ones(1, k or value.shape[-1 if multiply is linear else -2], dtype=value.dtype)
        gm, _ = trace(lambda x: multiply(x, function(*module.buffers())), x)
        graph = Regions(gm).flatten().graph
        constants = find_constants(graph)
        (product,) = find_products(graph, constants)
        assert product.refusal is None
        return cls.of(product.weight_node, product.node, product.matrices, constants)

    return decode
