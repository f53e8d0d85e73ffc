import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marlin_w4a16.passes.graph.constants import Constants

TABLE = torch.linspace(-2, 5, 8)


def holds(value, constants: Constants) -> bool:
    return value in constants.nodes or value in constants.leaves


class Holder(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        value = torch.arange(8.0)
        if kind == "parameter":
            value = nn.Parameter(value)
        if kind == "buffer":
            self.register_buffer("w", value)
        else:
            self.w = value

    def forward(self, x):
        return x + self.w


def closure():
    w = torch.arange(8.0)
    return lambda x: x + w


@pytest.mark.parametrize(
    "function",
    [Holder("parameter"), Holder("buffer"), Holder("attribute"), closure(), lambda x: x + TABLE],
    ids=["parameter", "buffer", "attribute", "closure", "global"],
)
def test_weights_are_leaves(last_sum, function):
    _, value, constants, _ = last_sum(function, torch.ones(8))
    assert constants.leaves == {value}


@pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
def test_weights_of_a_module_that_is_an_argument_are_leaves(last_sum, kind):
    _, value, constants, _ = last_sum(lambda module, x: module(x), Holder(kind), torch.ones(8))
    assert constants.leaves == {value}


def test_arguments_are_no_leaves(last_sum):
    _, value, constants, _ = last_sum(lambda x, y: x + y.mul(2), torch.ones(8), torch.ones(8))
    assert not constants.leaves and value not in constants.nodes


@torch.library.custom_op("marlin_w4a16_tests::bump", mutates_args={"t"})
def bump(t: torch.Tensor, x: torch.Tensor) -> None:
    t.add_(1)


def scribble(x, w):
    w[0] = x[0]


WRITES_TO_THE_WEIGHT = {
    "add_": lambda x, w: w.add_(0), "setitem": scribble, "view": lambda x, w: w.view(2, 4)[0].zero_(),
    "out": lambda x, w: torch.add(x, 0, out=w), "copy_": lambda x, w: w.copy_(x),
    "custom op": lambda x, w: bump(w, x), "foreach": lambda x, w: torch._foreach_add_([w], 1.0),
    "inplace": lambda x, w: F.relu(w, inplace=True),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES_TO_THE_WEIGHT.values(), ids=WRITES_TO_THE_WEIGHT)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_that_the_graph_writes_to_is_not_constant(last_sum, write, when):
    cache = torch.arange(8.0)

    def function(x):
        if when == "before":
            write(x, cache)
        y = x + cache * 2
        if when == "after":
            write(x, cache)
        return y

    _, value, constants, _ = last_sum(function, torch.ones(8))
    assert not constants.leaves and not holds(value, constants)


def test_a_weight_that_the_graph_writes_to_by_another_name_is_not_constant(last_sum):
    cache = torch.arange(8.0)
    alias = cache.view(2, 4)

    def function(x):
        alias[0] = x[:4]
        return x + cache * 2

    _, value, constants, _ = last_sum(function, torch.ones(8))
    assert not constants.leaves and not holds(value, constants)


def masked(x, w):
    t = w.clone()
    t[0] = x[0]
    return t


DEPENDS_ON_THE_INPUT = {
    "product": lambda x, w: w * x.sum(), "index": lambda x, w: w[x.int()], "setitem": masked,
    "out": lambda x, w: torch.mul(x, 2, out=w.clone()),
    "checkpoint": lambda x, w: checkpoint(torch.sin, w, use_reentrant=False),
}  # fmt: skip


@pytest.mark.parametrize("value_of", DEPENDS_ON_THE_INPUT.values(), ids=DEPENDS_ON_THE_INPUT)
def test_what_may_depend_on_the_input_is_not_constant(last_sum, value_of):
    _, value, constants, _ = last_sum(lambda x: x + value_of(x, TABLE), torch.ones(8))
    assert not holds(value, constants)


RANDOM = {
    "rand_like": torch.rand_like, "randn": lambda w: w * torch.randn(8),
    "bernoulli": lambda w: torch.bernoulli(w.sigmoid()), "dropout": lambda w: F.dropout(w, 0.1),
    "alpha_dropout": lambda w: F.alpha_dropout(w, 0.1, training=True), "uniform_": lambda w: w.clone().uniform_(),
    "normal_": lambda w: w.clone().normal_(), "exponential_": lambda w: w.clone().exponential_(),
    "randint": lambda w: w + torch.randint(0, 2, (8,)), "poisson": lambda w: torch.poisson(w.abs()),
}  # fmt: skip


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_random_values_are_not_constant(last_sum, draw):
    _, value, constants, _ = last_sum(lambda x: x + draw(TABLE), torch.ones(8))
    assert not holds(value, constants)


def test_bitwise_and_is_no_write(last_sum):
    codes = torch.arange(8)
    _, value, constants, _ = last_sum(lambda x: x + (operator.and_(codes, 3) + operator.or_(codes, 4)), torch.ones(8))
    assert len(constants.leaves) == 1 and value in constants.nodes
