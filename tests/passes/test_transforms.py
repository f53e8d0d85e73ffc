"""Products under transforms of torch.func, and of inputs that are no plain tensors: left, with the reason."""

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import linear

import marlin_w4a16.backend
from marlin_w4a16 import explain
from marlin_w4a16.passes.outcome import Replaced

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
VMAP, GRAD = "inside torch.func's vmap", "inside torch.func's grad, vjp or jvp"
FORWARD = "inside a level of forward-mode differentiation"


def dual(model: nn.Module, x: Tensor) -> Tensor:
    with forward.dual_level():
        return forward.unpack_dual(model(forward.make_dual(x, x)))[1]


def under_vmap(model: nn.Module, x: Tensor) -> Tensor:
    table = model.table
    return vmap(lambda codes: table[torch.stack((codes & 15, codes >> 4), -1).flatten().int()])(model.codes)


# what is made of a linear and an input, and what becomes of each weight
LEFT = {
    "vmap": (lambda m, x: vmap(m)(x), [VMAP]),
    "vmap of other axes": (lambda m, x: vmap(m, in_dims=1, out_dims=1)(x.T), [VMAP]),
    "vmap in chunks": (lambda m, x: torch.vmap(m, chunk_size=2)(x), [VMAP]),
    "vmap of vmap": (lambda m, x: vmap(vmap(m))(x[None]), [VMAP]),
    "grad": (lambda m, x: grad(lambda x: m(x).sum())(x), [GRAD]),
    "vmap of grad": (lambda m, x: vmap(grad(lambda x: m(x).sum()))(x), [GRAD]),
    "vjp": (lambda m, x: vjp(m, x)[1](torch.ones(3, 64))[0], [GRAD]),
    "jvp": (lambda m, x: jvp(m, (x,), (x,))[1], [FORWARD]),
    "jacrev": (lambda m, x: jacrev(m)(x[0]), [GRAD]),
    "jacfwd": (lambda m, x: jacfwd(m)(x[0]), [FORWARD]),
    "hessian": (lambda m, x: hessian(lambda x: m(x).square().sum())(x[0]), [FORWARD]),
    "dual numbers": (dual, [FORWARD]),
    "a product by another name": (lambda m, x: vmap(lambda x: torch.mv(m.weight(), x))(x), [VMAP]),
    "what is captured, under grad": (lambda m, x: grad(lambda y: (y + m(x)).sum())(x), [GRAD]),
    "beside others": (lambda m, x: m(vmap(m)(m(x))), [None, VMAP]),
    "what is captured, under vmap": (lambda m, x: vmap(lambda y: y + m(x).sum())(x), [None]),
    "functional_call": (lambda m, x: functional_call(m, {}, (x,)), [None]),
}


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """What Inductor would get runs as it is."""
    monkeypatch.setattr(marlin_w4a16.backend, "compile_graph", lambda gm, *_: gm.forward)


@pytest.mark.parametrize("transformed, outcomes", LEFT.values(), ids=LEFT)
def test_a_product_under_a_transform_is_left(fp4_linear, assert_near, uncompiled, transformed, outcomes):
    model = fp4_linear(64, 64)
    rows = explain(transformed, model, X).rows
    found = [None if isinstance(row.outcome, Replaced) else row.outcome.reason for row in rows]
    assert sorted(found, key=str) == sorted(outcomes, key=str)
    assert_near(torch.compile(transformed, backend="marlin_w4a16")(model, X), transformed(model, X))


@pytest.mark.parametrize("decoded", [lambda m, x: vjp(lambda x: m.weight() + 0 * x[0, 0], x)[0], under_vmap])
def test_a_weight_that_is_decoded_under_a_transform_is_no_candidate(fp4_linear, uncompiled, decoded):
    model = fp4_linear(64, 64)
    product = lambda m, x: linear(x, decoded(m, x))  # noqa: E731
    assert explain(product, model, X).rows == ()
    assert torch.equal(torch.compile(product, backend="marlin_w4a16")(model, X), product(model, X))


def test_what_is_compiled_for_dual_numbers_gives_tangents(fp4_linear, uncompiled):
    model = fp4_linear(64, 64)
    run = torch.compile(model, backend="marlin_w4a16")
    with forward.dual_level():
        assert torch.equal(forward.unpack_dual(run(forward.make_dual(X, X))).tangent, model(X))


def test_a_level_that_is_entered_after_compiling_raises_and_loses_no_tangent(fp4_linear, uncompiled):
    run = torch.compile(fp4_linear(64, 64), backend="marlin_w4a16")
    run(X)
    with forward.dual_level():
        run(X)
        with pytest.raises(NotImplementedError, match=r"linear: found an input with a tangent of .*, expected none: "):
            run(forward.make_dual(X, X))


def jagged() -> Tensor:
    return torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)


def two() -> Tensor:
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(X, X)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, kind", [(jagged, "NestedTensor"), (two, "TwoTensor")])
def test_an_input_that_is_no_plain_tensor_is_left(fp4_linear, uncompiled, make, kind):
    model = fp4_linear(64, 64)
    with torch.no_grad():
        (row,) = explain(model, make()).rows
        assert row.outcome.reason.startswith(f"F.linear of a {kind}")
        torch.compile(model, backend="marlin_w4a16")(make())
