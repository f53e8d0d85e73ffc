import operator
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from marlin_w4a16.passes.constants import Constants, evaluate, find_constants, slice_of

TABLE = torch.linspace(-2, 5, 8)


@pytest.fixture
def last_sum(trace):
    """For a function that ends in ``x + value``: the sum, the value, the constants and the inputs of its graph."""

    def parts(function, *args):
        gm, inputs = trace(function, *args)
        total = next(n for n in reversed(gm.graph.nodes) if n.target is operator.add)
        return total, total.args[1], find_constants(gm.graph), inputs

    return parts


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


def by_setitem(w):
    t = torch.empty(8)
    t[..., 0::2], t[..., 1::2] = w[:4], w[4:]
    return t


def by_copy(w):
    t = torch.empty(8)
    t.copy_(w.flip(0))
    return t


def by_out(w):
    t = torch.empty(8)
    torch.mul(w, 3, out=t)
    return t


def by_two_outs(w):
    t, exponent = w.clone(), torch.empty(8, dtype=torch.int32)
    torch.frexp(w * 3, out=(t, exponent))
    return t


def through_views(w):
    t = w.clone()
    t.view(2, 4)[1].detach().add_(1)
    return t


def after_a_view(w):
    t = w.clone()
    view = t.flip(0).view(2, 4).view(8)
    view.mul_(2)
    return view


def with_its_result_dropped(w):
    t = w * 2
    t.mul_(3)
    return t


def by_augmented_assignment(w):
    t = w.clone()
    alias = t
    t += 1
    return alias


def by_inplace_argument(w):
    t = w.clone()
    F.relu(t, inplace=True)
    return t


def by_inplace_argument_without_its_name(w):
    t = w.clone()
    F.relu(t, True)
    return t


def by_foreach(w):
    t = w.clone()
    torch._foreach_mul_([t], 2.0)
    return t


def by_init(w):
    t = w.clone()
    nn.init.zeros_(t)
    return t


IN_PLACE = (
    by_setitem, by_copy, by_out, by_two_outs, through_views, after_a_view, with_its_result_dropped,
    by_augmented_assignment, by_inplace_argument, by_inplace_argument_without_its_name, by_foreach, by_init,
)  # fmt: skip


@pytest.mark.parametrize("write", IN_PLACE)
def test_writes_to_a_temporary_belong_to_it(last_sum, write):
    total, value, constants, inputs = last_sum(lambda x: x + write(TABLE), torch.ones(8))
    assert holds(value, constants)
    nodes = slice_of(value, total, constants)
    live = dict(zip(value.graph.find_nodes(op="placeholder"), inputs, strict=True))
    found = evaluate(value, nodes, {n: live[n] for n in nodes if n in constants.leaves})
    assert torch.equal(found, write(TABLE))
    assert not torch.equal(found, TABLE)


def test_a_write_counts_from_where_it_stands(trace):
    def two_reads(x):
        t = TABLE.clone()
        early = x + t
        t.mul_(2)
        return early, x + t

    gm, _ = trace(two_reads, torch.ones(8))
    constants = find_constants(gm.graph)
    first, second = [n for n in gm.graph.nodes if n.target is operator.add]
    (leaf,) = constants.leaves
    read = [evaluate(n.args[1], slice_of(n.args[1], n, constants), {leaf: TABLE}) for n in (first, second)]
    assert torch.equal(read[0], TABLE) and torch.equal(read[1], 2 * TABLE)


@torch.library.custom_op("marlin_w4a16_tests::bump", mutates_args={"t"})
def bump(t: torch.Tensor, x: torch.Tensor) -> None:
    t.add_(1)


def scribble(x, w):
    w[0] = x[0]


WRITES_TO_THE_WEIGHT = {
    "add_": lambda x, w: w.add_(0),
    "setitem": scribble,
    "view": lambda x, w: w.view(2, 4)[0].zero_(),
    "out": lambda x, w: torch.add(x, 0, out=w),
    "copy_": lambda x, w: w.copy_(x),
    "custom op": lambda x, w: bump(w, x),
    "foreach": lambda x, w: torch._foreach_add_([w], 1.0),
    "inplace": lambda x, w: F.relu(w, inplace=True),
}


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
    "product": lambda x, w: w * x.sum(),
    "index": lambda x, w: w[x.int()],
    "setitem": masked,
    "out": lambda x, w: torch.mul(x, 2, out=w.clone()),
    "checkpoint": lambda x, w: checkpoint(torch.sin, w, use_reentrant=False),
}


@pytest.mark.parametrize("value_of", DEPENDS_ON_THE_INPUT.values(), ids=DEPENDS_ON_THE_INPUT)
def test_what_may_depend_on_the_input_is_not_constant(last_sum, value_of):
    _, value, constants, _ = last_sum(lambda x: x + value_of(x, TABLE), torch.ones(8))
    assert not holds(value, constants)


RANDOM = {
    "rand_like": torch.rand_like,
    "randn": lambda w: w * torch.randn(8),
    "bernoulli": lambda w: torch.bernoulli(w.sigmoid()),
    "dropout": lambda w: F.dropout(w, 0.1),
    "alpha_dropout": lambda w: F.alpha_dropout(w, 0.1, training=True),
    "uniform_": lambda w: w.clone().uniform_(),
    "normal_": lambda w: w.clone().normal_(),
    "exponential_": lambda w: w.clone().exponential_(),
    "randint": lambda w: w + torch.randint(0, 2, (8,)),
    "poisson": lambda w: torch.poisson(w.abs()),
}


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_random_values_are_not_constant(last_sum, draw):
    _, value, constants, _ = last_sum(lambda x: x + draw(TABLE), torch.ones(8))
    assert not holds(value, constants)


def test_bitwise_and_is_no_write(last_sum):
    codes = torch.arange(8)
    _, value, constants, _ = last_sum(lambda x: x + (operator.and_(codes, 3) + operator.or_(codes, 4)), torch.ones(8))
    assert len(constants.leaves) == 1 and value in constants.nodes


class Live(TorchDispatchMode):
    """The most tensors computed at once that were alive together."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def _died(self):
        self.now -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.now += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(out, self._died)
        return out


def test_dead_values_are_freed_on_the_way(last_sum):
    def chain(x):
        value = TABLE
        for _ in range(10):
            value = value.sin() * 2
        return x + value

    total, value, constants, _ = last_sum(chain, torch.ones(8))
    (leaf,) = constants.leaves
    with Live() as live:
        evaluate(value, slice_of(value, total, constants), {leaf: TABLE})
    assert live.peak == 2
