"""What is known of operations: nothing random is constant, and nothing that is written to on the quiet."""

import itertools
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from marlin_w4a16.passes.graph import purity
from marlin_w4a16.passes.graph.purity import is_pure, written_by

TABLE = torch.linspace(-2, 5, 8)
MODULES = (
    torch,
    torch.nn.functional,
    torch.special,
    torch.linalg,
    torch.fft,
    torch._C._nn,
    torch._C._VariableFunctions,
)


def called(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls a function, or a method by its name, with nodes of tensors in the place of tensors."""
    graph = fx.Graph()

    def node(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        placeholder = graph.placeholder("x")
        placeholder.meta["example_value"] = value
        return placeholder

    args, kwargs = torch.utils._pytree.tree_map(node, (args, kwargs))
    return graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)


def operators(namespace: str) -> Iterator[Any]:
    schemas = (schema.name.partition("::") for schema in torch._C._jit_get_all_schemas())
    names = {name for space, _, name in schemas if space == namespace}
    yield from (getattr(getattr(torch.ops, namespace), name) for name in sorted(names))


def overloads(packet: Any) -> list[Any]:
    return [getattr(packet, name) for name in packet.overloads()]


def spellings(packet: Any) -> Iterator[Any]:
    """Whatever has the name of an operator, with and without a trailing underscore."""
    yield from (packet, *overloads(packet))
    for name in {packet.__name__, packet.__name__.rstrip("_"), f"{packet.__name__}_"}:
        yield from (found for module in MODULES if callable(found := getattr(module, name, None)))
        if hasattr(Tensor, name):
            yield name


def draws(packet: Any) -> bool:
    tagged = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads(packet))
    return tagged or any("Generator" in str(overload._schema) for overload in overloads(packet))


DRAWING = [packet for packet in itertools.chain(operators("aten"), operators("prims")) if draws(packet)]


def test_no_random_operator_is_pure_by_any_name():
    found = [(packet, target) for packet in DRAWING for target in spellings(packet)]
    assert len(DRAWING) > 70 and len(found) > 300
    assert not [target for _, target in found if is_pure(called(target, TABLE))]


def test_no_function_of_the_tables_calls_a_random_one():
    """As far as what it is written in shows: the names of what it calls."""
    random = {name for packet in DRAWING for name in (packet.__name__, packet.__name__.rstrip("_"))} - {"random"}
    random |= {"rand", "randn", "manual_seed", *purity._DRAWING.split()}
    functions = [f for f, rule in purity._FUNCTIONS.items() if rule.pure and isinstance(f, types.FunctionType)]
    assert len(functions) > 80
    assert not [f for f in functions if random & set(f.__code__.co_names)]


def test_no_python_function_of_torch_is_pure_unless_it_was_read():
    names = [vars(module) for module in (torch, torch.functional, F, torch.random, torch.cuda, torch.nn.init)]
    functions = {f for named in names for f in named.values() if isinstance(f, types.FunctionType)}
    assert len(functions) > 300
    assert {f for f in functions if is_pure(called(f, TABLE))} <= purity._FUNCTIONS.keys()


def test_in_place_operators_write_to_what_their_schemas_say():
    for packet in operators("aten"):
        name = packet.__name__
        if hasattr(Tensor, name) and name.endswith("_") and not name.endswith("__"):
            node = called(name, TABLE, TABLE)
            assert node.args[0] in written_by(node), name


@torch.compiler.allow_in_graph
def counting(t: Tensor) -> Tensor:
    return t + 1


@torch.library.custom_op("marlin_w4a16_tests::hidden", mutates_args=())
def hidden(t: Tensor) -> Tensor:
    return t * 2


@hidden.register_fake
def _(t: Tensor) -> Tensor:
    return torch.empty_like(t)


ROWS = TABLE.view(1, 2, 4)
NOT_CONSTANT = {
    "a function of somebody else": counting, "an operator of somebody else": hidden,
    "native_dropout": lambda w: torch.native_dropout(w, 0.5, True)[0],
    "dropout_": lambda w: torch.dropout_(w.clone(), 0.5, True),
    "feature_dropout": lambda w: torch.feature_dropout(w.view(1, 8), 0.5, True)[0],
    "rrelu": lambda w: F.rrelu(w, training=True),
    "overload": lambda w: torch.ops.aten.bernoulli.p(w, 0.5), "packet": lambda w: torch.ops.aten.rand_like(w),
    "attention": lambda w: F.scaled_dot_product_attention(*[w.view(1, 1, 1, 8)] * 3, dropout_p=0.5).flatten(),
    "gumbel_softmax": F.gumbel_softmax, "gamma": lambda w: torch._standard_gamma(w.abs()),
    "dirichlet": lambda w: torch._sample_dirichlet(w.abs()),
    "pooling": lambda w: F.fractional_max_pool2d(ROWS, 1, 1).flatten(),
    "cauchy_": lambda w: w.clone().cauchy_(), "log_normal_": lambda w: w.clone().log_normal_(),
    "resized": lambda w: torch.empty(0).set_(w.clone()),
}  # fmt: skip


@pytest.mark.parametrize("value_of", NOT_CONSTANT.values(), ids=NOT_CONSTANT)
def test_what_is_not_known_to_repeat_is_not_constant(last_sum, value_of):
    _, value, constants, _ = last_sum(lambda x: x + value_of(TABLE), torch.ones(8))
    assert value not in constants


MEAN, ONES = torch.zeros(8), torch.ones(8)
CONSTANT = {
    "batch_norm": lambda w: F.batch_norm(w[None], MEAN, ONES)[0],
    "embedding": lambda w: F.embedding(MEAN.int(), w[:, None])[:, 0],
    "torch.batch_norm": lambda w: torch.batch_norm(w[None], None, None, MEAN, ONES, False, 0.1, 1e-5, False)[0],
    "statistics of its own": lambda w: F.batch_norm(w.expand(2, 8), MEAN * 1, ONES * 1, training=True)[0],
    "instance_norm": lambda w: F.instance_norm(w.view(1, 1, 8)).flatten(),
    "pooling": lambda w: F.max_pool1d(w[None], 1)[0],
    "a list": lambda w: torch.Tensor([0.0] * 8),
    "reversed": lambda w: 2 - w,
    "by an overload": lambda w: torch.ops.aten.add.Tensor(w, w),
    "data": lambda w: w.data * 1, "relu": lambda w: F.relu(w), "einsum": lambda w: torch.einsum("a,b->a", w, w),
    "sort": lambda w: w.sort().values,
    "linalg": lambda w: w / torch.linalg.norm(w),
    "no_grad": torch.no_grad()(lambda w: w * 2),
}  # fmt: skip


@pytest.mark.parametrize("value_of", CONSTANT.values(), ids=CONSTANT)
def test_what_is_known_to_repeat_is_constant(last_sum, value_of):
    _, value, constants, _ = last_sum(lambda x: x + value_of(TABLE), torch.ones(8))
    assert value in constants


def native(x, w):
    torch.native_batch_norm(x.expand(2, 8), None, None, w, torch.ones(8), True, 0.1, 1e-5)


ids = torch.zeros(1, 2, dtype=torch.long)
HIDDEN_WRITES = {
    "batch_norm": lambda x, w: F.batch_norm(x.expand(2, 8), torch.zeros(8), w, training=True), "native": native,
    "its module": lambda x, w: nn.functional.batch_norm(x.expand(2, 8), w, torch.ones(8), None, None, True, 0.1),
    "instance_norm": lambda x, w: F.instance_norm(x.view(1, 1, 8).expand(1, 8, 8), w, torch.ones(8)),
    "torch.batch_norm": lambda x, w: torch.batch_norm(x.expand(2, 8), None, None, w * 1, w, True, 0.1, 1e-5, False),
    "aten": lambda x, w: torch.ops.aten.native_batch_norm.default(x.expand(2, 8), None, None, w * 1, w, True, 0.1, 0.0),
    "embedding": lambda x, w: F.embedding(ids, w.view(2, 4), max_norm=0.5),
    "embedding_bag": lambda x, w: F.embedding_bag(ids, w.view(2, 4), max_norm=0.5),
    "renorm_": lambda x, w: torch.embedding_renorm_(w.view(2, 4), ids[0], 0.5, 2.0),
    "dropout": lambda x, w: F.dropout(w, inplace=True),
    "a function of somebody else": lambda x, w: counting(w),
    "several": lambda x, w: torch._foreach_lerp_([w], [x], 0.5),
    "outs": lambda x, w: torch.sort(x, out=(w, torch.empty(8, dtype=torch.long))),
    "out by its place": lambda x, w: torch.norm(x, 2, 0, True, w.view(2, 4)[:1, 0]),
    "normalize, out by its place": lambda x, w: F.normalize(x, 2.0, 0, 1e-12, w),
    "another shape in place": lambda x, w: w.view(2, 4).t_(),
}  # fmt: skip


@pytest.mark.parametrize("write", HIDDEN_WRITES.values(), ids=HIDDEN_WRITES)
def test_what_may_be_written_to_is_not_constant(last_sum, write):
    cache = torch.linspace(0.5, 2, 8)

    def function(x):
        write(x, cache)
        return x + cache * 2

    with torch.no_grad():
        _, value, constants, _ = last_sum(function, torch.ones(8))
    assert value not in constants and value.args[0] not in constants


READS = {
    "batch_norm": lambda x, w: F.batch_norm(x[None], w, w), "embedding": lambda x, w: F.embedding(ids, w.view(2, 4)),
    "dropout": lambda x, w: F.dropout(w), "an operator of somebody else": lambda x, w: hidden(w),
    "attention": lambda x, w: F.scaled_dot_product_attention(*[w.view(1, 1, 1, 8)] * 3),
}  # fmt: skip


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_only_read_stays_constant(last_sum, read):
    _, value, constants, _ = last_sum(lambda x: (read(x, TABLE), x + TABLE * 2)[1], torch.ones(8))
    assert value in constants
