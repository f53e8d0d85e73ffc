"""The op ``moe`` on a CPU, against float64 from the exactly decoded weights."""

import contextlib
import re
from dataclasses import astuple, fields, replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch._subclasses import FakeTensorMode

from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.moe import Arguments, activation_args, arguments_of, moe
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.experts import Experts
from mixtures.oracle import ACTIVATIONS, Mixture, draw_mixture, draw_routing, draw_stack
from narrow import matrix

OPS = torch.ops.marlin_w4a16
LIMITS = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=str)
FORMATS = [("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "mxfp4"), ("mxfp4", "e4m3 group 32")]


def run(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
    return moe(
        x, experts.w13, experts.w2, weights, ids, activation=experts.activation, bias13=experts.bias13,
        bias2=experts.bias2, weight_on_input=experts.weight_on_input, expert_map=expert_map,
    )  # fmt: skip


def arguments(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> tuple:
    """Those of the op, in its order."""
    packed = (*weight_args(experts.w13), *weight_args(experts.w2), experts.bias13, experts.bias2)
    return (x, weights, ids, *packed, *activation_args(experts.activation), experts.weight_on_input, expert_map)


@pytest.mark.parametrize("op, before", [("moe", 0), ("moe_grad", 1)])
def test_every_argument_of_the_schema_is_found_by_its_name(op, before):
    found = arguments_of([argument.name for argument in getattr(OPS, op).default._schema.arguments[before:]])
    weight = ("words", "scales", "multiplier", "n", "k", "group", "kind", "layout", "contract")
    for field in fields(Arguments):
        expected: Any = field.name
        if field.name in ("w13", "w2"):
            expected = tuple(f"{name}{field.name[1:]}" for name in weight)
        elif field.name == "activation":
            expected = Activation(*(f.name for f in fields(Activation)))
            assert activation_args(expected) == astuple(expected) == tuple(f.name for f in fields(Activation))
        assert getattr(found, field.name) == expected


def rounded(mixture: Mixture, dtype: torch.dtype) -> Mixture:
    """With biases that the dtype holds."""
    biases = {name: None if b is None else b.to(dtype).double() for name, b in biases_of(mixture).items()}
    return replace(mixture, **biases)


def biases_of(mixture: Mixture) -> dict[str, Tensor | None]:
    return {"bias13": mixture.bias13, "bias2": mixture.bias2}


def assert_right(mixture: Mixture, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
    mixture = rounded(mixture, x.dtype)
    found = run(mixture.packed(x.dtype), x, weights, ids, expert_map)
    exact = mixture.exact(x, weights, ids, expert_map)
    assert (found.shape, found.dtype) == (x.shape[:1] + exact.shape[1:], x.dtype)
    assert (found.double() - exact).norm() <= LIMITS[x.dtype] * exact.norm()
    return found


@DTYPES
@pytest.mark.parametrize("formats", FORMATS, ids=" ".join)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_every_activation_in_every_format(name, formats, biases, dtype):
    mixture = draw_mixture(name=name, formats=formats, biases=biases)
    assert_right(mixture, torch.randn(7, 64, dtype=dtype), *draw_routing(7, 2, 4))


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 2.3e-4), (torch.bfloat16, 1.75e-3)], ids=str)
def test_it_is_rounded_between_the_products_and_once_more(dtype, limit):
    mixture, x = draw_mixture(), torch.randn(64, 64, dtype=dtype)
    weights, ids = draw_routing(64, 2, 4)
    found = run(mixture.packed(dtype), x, weights, ids).double()
    exact = mixture.exact(x, weights, ids, between=dtype)
    assert (found - exact).norm() <= limit * exact.norm() < (found - mixture.exact(x, weights, ids)).norm()


@pytest.mark.parametrize("intermediate", [64, 96, 100, 176, 192, 704, 1856, 2880])
@pytest.mark.parametrize("name", ["gpt-oss", "NemotronH", "DeepSeek-V4"])
@pytest.mark.parametrize("formats", FORMATS[:3], ids=" ".join)
def test_any_intermediate_size(intermediate, name, formats):
    mixture = draw_mixture(2, 32, intermediate, name, formats, biases=True)
    assert_right(mixture, torch.randn(3, 32), *draw_routing(3, 2, 2))


@pytest.mark.parametrize("experts, k, tokens", [(1, 1, 3), (8, 8, 5), (64, 6, 33), (128, 22, 4), (512, 10, 8)])
def test_many_experts_and_choices(experts, k, tokens):
    mixture = draw_mixture(experts, 32, 32, "gpt-oss", biases=True)
    assert_right(mixture, torch.randn(tokens, 32), *draw_routing(tokens, k, experts))


@pytest.mark.parametrize("tokens", [0, 1, 2, 17, 65])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_any_number_of_tokens(tokens, weight_on_input):
    mixture = draw_mixture(name="gpt-oss", biases=True, weight_on_input=weight_on_input)
    assert_right(mixture, torch.randn(tokens, 64), *draw_routing(tokens, 3, 4))


def test_the_result_may_have_another_width():
    mixture, x, routing = replace(draw_mixture(), w2=draw_stack(4, 80, 96)), torch.randn(5, 64), draw_routing(5, 2, 4)
    assert_right(mixture, x, *routing)
    torch.library.opcheck(OPS.moe.default, arguments(mixture.packed(), x, *routing), test_utils="test_faketensor")


IDS = {
    "all on one expert": [[2], [2], [2]], "none on some": [[0, 3], [3, 0], [0, 3]],
    "the same expert twice": [[1, 1], [2, 2], [1, 2]], "three times": [[1, 1, 1], [1, 1, 1], [0, 0, 1]],
    "-1": [[-1, 0], [1, -1], [-1, -1]], "their number": [[4, 0], [1, 4], [4, 4]],
    "beyond": [[5, 0], [2**31 - 1, 1], [100, -(2**31)]], "nothing local": [[-1, 9], [4, -7], [-1, -1]],
    "no choices": [[], [], []],
}  # fmt: skip


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_any_choice(ids, dtype, weight_on_input):
    mixture = draw_mixture(biases=True, name="gpt-oss", weight_on_input=weight_on_input)
    ids = torch.tensor(ids, dtype=dtype).reshape(3, -1)
    found = assert_right(mixture, torch.randn(3, 64), torch.rand(ids.shape), ids)
    nowhere = ((ids < 0) | (ids >= 4)).all(1)
    assert torch.equal(found[nowhere], torch.zeros(int(nowhere.sum()), 64))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8], ids=str)
def test_narrow_ids(dtype):
    ids = torch.tensor([[0, 3], [2, 200], [1, 1]]).to(dtype)
    assert_right(draw_mixture(), torch.randn(3, 64), torch.rand(3, 2), ids)


@pytest.mark.parametrize(
    "expert_map",
    [[-1, 2, 0, -1, 1, 3, -1], [3, 2, 1, 0], [-1, -1, -1], [4, 0, 99, 1], []],
    ids=["some elsewhere", "permuted", "all elsewhere", "beyond", "empty"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_an_expert_map_says_where_experts_are(expert_map, dtype):
    ids = torch.tensor([[0, 1, 2], [4, 5, 3], [6, -1, 7], [2, 2, 99]])
    expert_map = torch.tensor(expert_map, dtype=dtype)
    assert_right(draw_mixture(biases=True), torch.randn(4, 64), torch.rand(4, 3), ids, expert_map)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("with_map", [False, True])
def test_what_is_not_local_is_not_read(poison, with_map):
    mixture = draw_mixture(biases=True)
    ids, weights = torch.tensor([[0, -1], [-1, 7], [1, 0], [9, 2]]), torch.rand(4, 2)
    expert_map = torch.tensor([0, 1, 2, -1]) if with_map else None
    x, elsewhere = torch.randn(4, 64), ids.where((ids >= 0) & (ids < 3), -1) < 0
    clean = run(mixture.packed(), x, weights.where(~elsewhere, 0), ids, expert_map)
    x[1] = poison  # a token of no local expert
    experts = mixture.packed()
    for t in (experts.w13.multiplier, experts.w2.multiplier, experts.bias13, experts.bias2):
        t[3] = poison  # an expert nobody chose
    found = run(experts, x, weights.where(~elsewhere, poison), ids, expert_map)
    assert torch.equal(found, clean) and bool(found.isfinite().all())


def test_zero_weights_and_zero_rows_give_zeros():
    mixture = draw_mixture(name="Qwen3")
    x, (weights, ids) = torch.randn(5, 64), draw_routing(5, 2, 4)
    assert torch.equal(run(mixture.packed(), x, torch.zeros_like(weights), ids), torch.zeros(5, 64))
    assert torch.equal(run(mixture.packed(), torch.zeros(5, 64), weights, ids), torch.zeros(5, 64))


def test_the_order_of_tokens_and_the_company_of_others_change_no_bit():
    experts, x = draw_mixture(8, biases=True).packed(torch.bfloat16), torch.randn(40, 64, dtype=torch.bfloat16)
    weights, ids = draw_routing(40, 3, 8)
    found = run(experts, x, weights, ids)
    assert torch.equal(found, run(experts, x, weights, ids))
    shuffled = torch.randperm(40)
    torch.testing.assert_close(run(experts, x[shuffled], weights[shuffled], ids[shuffled]), found[shuffled])


@DTYPES
def test_routing_weights_of_any_dtype_are_applied_in_float32(dtype):
    mixture, x = draw_mixture(biases=True), torch.randn(5, 64)
    weights, ids = draw_routing(5, 2, 4, dtype)
    assert torch.equal(run(mixture.packed(), x, weights, ids), run(mixture.packed(), x, weights.float(), ids))


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_strides_do_not_change_the_result(strides):
    mixture = draw_mixture(biases=True)
    x = {
        "transposed": torch.randn(64, 6).T,
        "sliced": torch.randn(12, 128)[::2, ::2],
        "expanded": torch.randn(1, 64).expand(6, 64),
    }[strides]
    weights, ids = (t.T.contiguous().T for t in draw_routing(6, 2, 4))
    dense = [t.contiguous() for t in (x, weights, ids)]
    assert not x.is_contiguous() and not ids.is_contiguous()
    assert torch.equal(run(mixture.packed(), x, weights, ids), run(mixture.packed(), *dense))


# Gradients.


def leaves(mixture: Mixture, x: Tensor, weights: Tensor) -> tuple[Mixture, list[Tensor]]:
    """The mixture on float64 leaves, and those: x, routing weights and the biases that there are."""
    found = [x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()]
    biases = {name: b.clone().requires_grad_() for name, b in biases_of(mixture).items() if b is not None}
    return replace(mixture, **biases), [*found, *biases.values()]


def gradients(mixture: Mixture, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> list:
    """Pairs of found and exact gradients of a random product."""
    seed = torch.randn(len(x), mixture.w2.n)
    exact_mixture, exact = leaves(mixture, x, weights)
    out = exact_mixture.exact(*exact[:2], ids, expert_map)
    none = [None] * len(exact)  # nothing local
    expected = torch.autograd.grad(out, exact, seed.double(), allow_unused=True) if out.requires_grad else none
    own = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(exact, [x.dtype, weights.dtype, *[x.dtype] * 2])]  # noqa: B905
    biases = dict(zip([n for n, b in biases_of(mixture).items() if b is not None], own[2:], strict=True))
    experts = replace(mixture, **biases).packed(x.dtype)
    found = torch.autograd.grad(run(experts, *own[:2], ids, expert_map), own, seed.to(x.dtype))
    return [(f, torch.zeros_like(o) if e is None else e) for f, e, o in zip(found, expected, own, strict=True)]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_gradients_are_those_of_the_dense_formula(name, weight_on_input, biases):
    mixture = draw_mixture(name=name, biases=biases, intermediate=100, weight_on_input=weight_on_input)
    pairs = gradients(mixture, torch.randn(6, 64), *draw_routing(6, 3, 4))
    assert len(pairs) == (4 if biases else 2)
    for found, exact in pairs:
        assert found.shape == exact.shape
        assert (found.double() - exact).norm() <= 1e-5 * exact.norm() and exact.norm() > 0


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_gradients_of_any_choice(ids):
    ids = torch.tensor(ids, dtype=torch.int64).reshape(3, -1)
    for found, exact in gradients(draw_mixture(biases=True), torch.randn(3, 64), torch.rand(ids.shape), ids):
        assert (found.double() - exact).norm() <= 1e-5 * exact.norm()


def test_gradients_with_a_map_and_none_of_what_is_not_local():
    ids, expert_map = torch.tensor([[0, 3], [3, -1], [1, 9]]), torch.tensor([2, 0, 1, -1])
    x, weights = torch.randn(3, 64), torch.rand(3, 2)
    pairs = gradients(draw_mixture(biases=True), x, weights, ids, expert_map)
    for found, exact in pairs:
        assert (found.double() - exact).norm() <= 1e-5 * exact.norm()
    assert torch.equal(pairs[0][0][1], torch.zeros(64)) and torch.equal(pairs[1][0][1], torch.zeros(2))
    x[1], weights[1] = torch.nan, torch.nan
    assert all(bool(found.isfinite().all()) for found, _ in gradients(draw_mixture(), x, weights, ids, expert_map))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_have_the_dtypes_of_what_they_are_of(dtype):
    mixture = rounded(draw_mixture(biases=True, name="gpt-oss"), dtype)
    pairs = gradients(mixture, torch.randn(6, 64, dtype=dtype), *draw_routing(6, 3, 4))
    assert [found.dtype for found, _ in pairs] == [dtype, torch.float32, dtype, dtype]
    for found, exact in pairs:
        assert (found.double() - exact).norm() <= LIMITS[dtype] * exact.norm()


@pytest.mark.parametrize("wanted", range(4))
def test_only_what_asks_for_a_gradient_gets_one(wanted):
    x, (weights, ids) = torch.randn(3, 64), draw_routing(3, 2, 4)
    experts = draw_mixture(biases=True).packed()
    given = [x, weights, experts.bias13, experts.bias2]
    given[wanted].requires_grad_()
    run(experts, x, weights, ids).sum().backward()
    assert [t.grad is not None for t in given] == [i == wanted for i in range(4)]


def test_a_second_derivative_is_an_error_and_no_silent_zero():
    x, (weights, ids) = torch.randn(3, 64, requires_grad=True), draw_routing(3, 2, 4)
    (first,) = torch.autograd.grad(run(draw_mixture().packed(), x, weights, ids).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="marlin_w4a16::moe: its gradient cannot be differentiated"):
        first.square().sum().backward()


@pytest.mark.parametrize("wanted", range(4))
def test_a_tangent_is_refused(wanted):
    x, (weights, ids) = torch.randn(3, 64), draw_routing(3, 2, 4)
    experts = draw_mixture(biases=True).packed()
    given = [x, weights, experts.bias13, experts.bias2]
    with forward.dual_level():
        x, weights, *biases = (forward.make_dual(t, t) if i == wanted else t for i, t in enumerate(given))
        experts = replace(experts, bias13=biases[0], bias2=biases[1])
        with pytest.raises(NotImplementedError, match="marlin_w4a16::moe: found an input with a tangent"):
            run(experts, x, weights, ids)


# Under torch.compile.


def checked_calls() -> dict[str, tuple[Mixture, dict[str, Any]]]:
    return {
        "Qwen3": (draw_mixture(), {}),
        "gpt-oss": (draw_mixture(name="gpt-oss", biases=True, formats=("mxfp4", "mxfp4")), {}),
        "NemotronH": (draw_mixture(name="NemotronH"), {"expert_map": torch.tensor([0, -1, 2, 1, 3])}),
        "on the input": (draw_mixture(weight_on_input=True), {}),
    }


@pytest.mark.parametrize(
    "dtype, name", [(torch.float32, name) for name in checked_calls()] + [(torch.bfloat16, "gpt-oss")]
)
@pytest.mark.parametrize("tokens, grads", matrix(lambda i, j: i == j, [0, 5], [False, True]))
def test_opcheck(name, dtype, tokens, grads):
    mixture, more = checked_calls()[name]
    x, (weights, ids) = torch.randn(tokens, 64, dtype=dtype, requires_grad=grads), draw_routing(tokens, 2, 4, dtype)
    experts = mixture.packed(dtype)
    if grads:
        weights.requires_grad_()
        for bias in (experts.bias13, experts.bias2):
            _ = None if bias is None else bias.requires_grad_()
    args = arguments(experts, x, weights, ids, **more)
    torch.library.opcheck(OPS.moe.default, args)
    if not grads:
        torch.library.opcheck(OPS.moe_grad.default, (torch.randn(tokens, 64, dtype=dtype), *args))


@DTYPES
@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
def test_the_fakes_are_laid_out_like_the_real_results(dtype, biases):
    experts, x = draw_mixture(biases=biases).packed(dtype), torch.randn(64, 5, dtype=dtype).T
    args = arguments(experts, x, *draw_routing(5, 2, 4))
    for op, given in ((OPS.moe, args), (OPS.moe_grad, (torch.randn(5, 64, dtype=dtype), *args))):
        real = op(*given)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = op(*given)
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for r, f in pairs:
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("grads", [False, True])
def test_any_number_of_tokens_runs_one_compiled_graph(backend, grads):
    experts = draw_mixture(biases=True).packed()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda *args: run(experts, *args), backend=counter, fullgraph=True)
    for tokens in (7, 3, 64):
        x, (weights, ids) = torch.randn(tokens, 64, requires_grad=grads), draw_routing(tokens, 2, 4)
        for t in (x, weights, ids):
            torch._dynamo.mark_dynamic(t, 0)
        out, expected = compiled(x, weights, ids), run(experts, x, weights, ids)
        assert torch.equal(out, expected)
        if grads:
            assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (out, expected)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_it_computes_in_the_lower_dtype_and_returns_that_of_x(dtype):
    experts, x = draw_mixture(biases=True).packed(), torch.randn(5, 64, requires_grad=True)
    weights, ids = draw_routing(5, 2, 4)
    with torch.autocast("cpu", dtype=dtype):
        out = run(experts, x, weights, ids)
    assert out.dtype == torch.float32 and torch.equal(out, run(experts, x.to(dtype), weights, ids).float())
    out.sum().backward()
    assert x.grad.dtype == torch.float32 and bool(x.grad.any())


# What does not fit.


def call() -> dict[str, Any]:
    experts = draw_mixture(biases=True).packed()
    return {
        "x": torch.randn(3, 64), "w13": experts.w13, "w2": experts.w2, "topk_weights": torch.rand(3, 2),
        "topk_ids": torch.zeros(3, 2, dtype=torch.int64), "activation": Activation(), "bias13": experts.bias13,
        "bias2": experts.bias2,
    }  # fmt: skip


def matrix_of(packed):
    return packed.matrix(0)


WRONG = {
    "float64": ({"x": torch.ones(3, 64).double()}, "x: found torch.float64, expected one of (torch.float16"),
    "a batch": ({"x": torch.ones(1, 3, 64)}, "x: found shape (1, 3, 64), expected [tokens, hidden]"),
    "width": ({"x": torch.ones(3, 65)}, "x: found shape (3, 65), expected [tokens, 64]"),
    "x on meta": ({"x": torch.ones(3, 64, device="meta")}, "words13: found device cpu, expected that of the input"),
    "tokens": ({"x": torch.ones(4, 64)}, "topk_ids: found shape (3, 2), expected [4, k]"),
    "one matrix": ({"w13": matrix_of}, "words13: found shape (3, 1, 512), expected [experts, ...]"),
    "fewer experts": ({"w2": lambda w: draw_mixture(3).packed().w2}, "words2: found shape (3, 1, 2, 512), expected (4"),
    "no gates": ({"activation": Activation("relu2", False)}, "n13: found 192, expected 96, for 96 columns of the"),
    "gates": ({"w13": lambda w: draw_mixture(name="NemotronH").packed().w13}, "n13: found 96, expected 192"),
    "a function": ({"activation": Activation("mish")}, "function: found 'mish', expected one of ('silu', 'gelu'"),
    "float ids": ({"topk_ids": torch.zeros(3, 2)}, "topk_ids: found torch.float32, expected one of (torch.int64"),
    "flat ids": ({"topk_ids": torch.zeros(6).long()}, "topk_ids: found shape (6,), expected [3, k]"),
    "ids on meta": (
        {"topk_ids": torch.zeros(3, 2, device="meta").long()},
        "topk_ids: found device meta, expected that of the input, cpu",
    ),
    "integer weights": ({"topk_weights": torch.ones(3, 2).int()}, "topk_weights: found torch.int32, expected one of"),
    "fewer weights": ({"topk_weights": torch.ones(3, 1)}, "topk_weights: found (3, 1), expected (3, 2)"),
    "bias13's shape": ({"bias13": torch.ones(4, 96)}, "bias13: found shape (4, 96), expected (4, 192)"),
    "bias2's shape": ({"bias2": torch.ones(64)}, "bias2: found shape (64,), expected (4, 64)"),
    "bias2's dtype": ({"bias2": torch.ones(4, 64).double()}, "bias2: found torch.float64, expected one of"),
    "a float map": ({"expert_map": torch.ones(4)}, "expert_map: found torch.float32, expected one of (torch.int64"),
    "a square map": ({"expert_map": torch.ones(4, 4).long()}, "expert_map: found shape (4, 4), expected [all experts]"),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("fake", [False, True])
def test_a_wrong_argument_is_named(changes, message, fake):
    given = call()
    given |= {
        name: change(given[name]) if callable(change) and name[0] == "w" else change for name, change in changes.items()
    }
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with pytest.raises(ValueError, match=re.escape(f"marlin_w4a16::moe: {message}")), mode:
        moe(**given)


def test_a_gradient_of_another_shape_is_named():
    args = arguments(draw_mixture().packed(), torch.randn(3, 64), *draw_routing(3, 2, 4))
    with pytest.raises(ValueError, match=re.escape("marlin_w4a16::moe_grad: grad: found shape (3, 65), expected (3,")):
        OPS.moe_grad(torch.randn(3, 65), *args)
