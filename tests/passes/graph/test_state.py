"""Constants are evaluated in the state that the graph is in where they stand."""

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from marlin_w4a16.passes.graph.constants import find_constants, value_of_constant

W = torch.linspace(-2, 5, 64).view(8, 8)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def in_a_region(w):
    with bfloat16():
        return w @ w


def after_a_region(w):
    with bfloat16():
        v = w @ w
    return w @ v.float()


def in_two(w):
    with bfloat16(), torch.autocast("cpu", enabled=False):
        v = w @ w
    return v


def out_of_the_inner(w):
    with bfloat16():
        with torch.autocast("cpu", torch.float16):
            v = w @ w
        return v @ w


REGIONS = [in_a_region, after_a_region, in_two, out_of_the_inner, lambda w: w @ w]


def values(function) -> list[Tensor]:
    """What a backend finds that constants of ``x + function(W)`` are, the last of them last."""
    found: list[Tensor] = []

    def backend(gm, inputs):
        constants = find_constants(gm.graph)
        live = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        computed = [node for node in gm.graph.nodes if node in constants.nodes]
        found.extend(value_of_constant(node, constants, live) for node in computed)
        return gm.forward

    torch.compile(lambda x: x + function(W), backend=backend, fullgraph=True)(torch.ones(8, 8))
    return found


@pytest.mark.parametrize("function", REGIONS)
@pytest.mark.parametrize("around", [False, True])
def test_autocast_is_that_of_the_graph_within_that_of_the_call(function, around):
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        found, expected = values(function)[-1], function(W)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_the_default_dtype_is_that_of_the_call():
    torch.set_default_dtype(torch.float64)
    try:
        found = values(lambda w: torch.ones(8))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[-1].dtype == torch.float64


def in_doubles(w):
    torch.set_default_dtype(torch.float64)
    ones = torch.ones(8)
    torch.set_default_dtype(torch.float32)
    return ones


def deterministic(w):
    torch.use_deterministic_algorithms(True)
    v = w * 2
    torch.use_deterministic_algorithms(False)
    return v


def by_setting(w):
    torch.set_autocast_enabled("cpu", True)
    v = w @ w
    torch.set_autocast_enabled("cpu", False)
    return v


OLD_DYNAMO = pytest.mark.skipif(TorchVersion(torch.__version__) < TorchVersion("2.13"), reason="Dynamo breaks there")


@pytest.mark.parametrize("function", [in_doubles, deterministic, pytest.param(by_setting, marks=OLD_DYNAMO)])
def test_after_another_state_was_set_nothing_is_constant(function):
    assert not values(function)


def test_elements_that_nothing_writes_are_no_numbers():
    def half(w):
        v = torch.empty(8, 8)
        v[::2] = w[::2]
        return v * 1

    found = values(half)[-1]
    assert torch.equal(found[::2], W[::2]) and found[1::2].isnan().all()
    assert values(lambda w: torch.empty(8, dtype=torch.uint8))[-1].eq(255).all()
