"""Calls of `linear` that were made before, on a machine without a GPU: what is launched is noted."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16 import pack, quantize_nvfp4
from marlin_w4a16.fake_impls import eager
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.linear import again


@pytest.fixture
def known(monkeypatch):
    """A weight, an input and a bias with which a call was made and kept, and what was launched for them since."""
    weight = pack(quantize_nvfp4(torch.randn(64, 64)))
    launched: list[tuple[int, int]] = []
    monkeypatch.setattr(eager, "_is_right", lambda packed: True)
    monkeypatch.setattr(eager, "empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    monkeypatch.setattr(eager, "current_device", lambda: weight.words.get_device())
    monkeypatch.setattr(eager, "hooked", lambda: False)
    eager.proof_of(weight)
    x, bias = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(64)
    for row in (None, bias):
        eager.keep("linear", x, weight, row, torch.zeros(3, 64, dtype=torch.bfloat16), lambda: launched.append)
    return SimpleNamespace(weight=weight, x=x, bias=bias, launched=launched)


def test_a_call_that_is_known_is_launched(known):
    for bias in (None, known.bias):
        x = torch.zeros_like(known.x)
        out = again(x, known.weight, bias)
        assert (out.shape, out.dtype) == ((3, 64), x.dtype)
        assert known.launched[-1] == (x.data_ptr(), out.data_ptr())


@pytest.mark.parametrize(
    "x",
    [
        lambda x: x.half(),
        lambda x: x[:2],
        lambda x: x[None],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.zeros(3 * 64 + 1, dtype=x.dtype)[1:].view(3, 64),
        lambda x: torch.nn.Parameter(x, requires_grad=False),
    ],
    ids=["dtype", "fewer", "axes", "strides", "off the grid", "subclass"],
)
def test_another_input_is_not_known(known, x):
    assert again(x(known.x), known.weight, None) is None
    assert not known.launched


def test_gradients_are_asked_for_only_where_they_are_wanted(known):
    x = known.x.clone().requires_grad_()
    with torch.no_grad():
        assert again(x, known.weight, None).grad_fn is None
    assert again(x.detach(), known.weight, None).grad_fn is None
    assert again(x, known.weight, None).grad_fn is not None
    assert again(known.x, known.weight, known.bias.requires_grad_()).grad_fn is not None
    assert [address for address, _ in known.launched] == [t.data_ptr() for t in (x, x, x, known.x)]


@pytest.fixture
def trained(known):
    """An output whose backward is a call that was kept, its input and its bias."""
    eager.keep("gradient", known.x, known.weight, None, torch.zeros_like(known.x), lambda: known.launched.append)
    x, bias = known.x.clone().requires_grad_(), known.bias.requires_grad_()
    return again(x, known.weight, bias), x, bias


def test_a_gradient_that_is_known_is_launched(known, trained):
    out, x, bias = trained
    grad = torch.full_like(out, 2)
    out.backward(grad)
    assert known.launched[-1] == (grad.data_ptr(), x.grad.data_ptr())
    assert x.grad.shape == x.shape and bias.grad.eq(6).all()


@pytest.mark.parametrize("name", ["words", "scales", "multiplier"])
def test_a_weight_that_was_written_to_has_no_gradient(known, trained, name):
    out, *_ = trained
    getattr(known.weight, name).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))


def test_it_saves_what_the_op_saves(known, trained):
    """Checkpointing may run the one forward and recompute by the other."""
    x, saved = known.x.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        again(x, known.weight, None)
        torch.ops.marlin_w4a16.linear(x, *weight_args(known.weight), None)
    assert saved == [t.data_ptr() for t in known.weight.tensors] * 2


def test_a_second_backward_is_refused_as_that_of_a_dense_linear(known, trained):
    out, *_ = trained
    out.backward(torch.ones_like(out))
    with pytest.raises(RuntimeError, match="a second time"):
        out.backward(torch.ones_like(out))


@pytest.mark.parametrize("lazy", [torch._neg_view, lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype)])
def test_what_memory_does_not_hold_is_shown_the_op(known, lazy):
    assert again(lazy(known.x), known.weight, None) is None


def test_a_gradient_of_a_gradient_is_shown_the_op(known, trained):
    out, x, _ = trained
    launched = len(known.launched)
    grad = torch.ones_like(out).requires_grad_()
    (found,) = torch.autograd.grad(out, x, grad, create_graph=True)
    assert len(known.launched) == launched
    assert found.grad_fn is not None


@pytest.mark.parametrize(
    "bias", [lambda b: b.clone(), lambda b: b[:32], lambda b: b.view(torch.int32), lambda b: b.view(32, 2).t()]
)
def test_another_bias_is_not_known(known, bias):
    assert again(known.x, known.weight, bias(known.bias)) is None


@pytest.mark.parametrize("name", ["words", "scales", "multiplier"])
@pytest.mark.parametrize(
    "change", [lambda t: t.clone(), lambda t: t[:0], lambda t: t.unsqueeze(-1).expand(*t.shape, 2)]
)
def test_a_weight_that_was_changed_is_not_known(known, name, change):
    tensor = getattr(known.weight, name)
    tensor.data = change(tensor.data)
    assert again(known.x, known.weight, None) is None


@pytest.mark.parametrize(
    "enter", [TorchDispatchMode, lambda: torch.device("cpu"), lambda: torch.autocast("cpu"), forward_ad.dual_level]
)
def test_what_would_see_the_op_is_shown_it(known, enter):
    with enter():
        assert again(known.x, known.weight, None) is None


def test_transforms_of_inputs_and_biases_are_shown_the_op(known):
    seen = []

    def call(x, bias):
        seen.append(again(x, known.weight, bias))
        return x.sum() + bias.sum()

    torch.vmap(call)(known.x.expand(2, 3, 64), known.bias.expand(2, 64))
    torch.func.grad(call)(known.x.float(), known.bias)
    assert seen == [None, None]


def test_hooks_and_other_devices(known, monkeypatch):
    monkeypatch.setattr(eager, "hooked", lambda: True)
    assert again(known.x, known.weight, None) is None
    monkeypatch.setattr(eager, "hooked", lambda: False)
    monkeypatch.setattr(eager, "current_device", lambda: 5)
    assert again(known.x, known.weight, None) is None


def test_copies_of_a_weight_know_no_calls(known):
    assert again(known.x, copy.deepcopy(known.weight), None) is None


def test_a_call_is_bound_once_and_only_if_it_can_be(known):
    bound = []
    for x in (known.x, known.x[:2], known.x[:2]):
        eager.keep("linear", x, known.weight, None, torch.zeros(2, 64), lambda: bound.append(1))
    assert len(bound) == 2 and again(known.x[:2], known.weight, None) is None


def test_calls_are_forgotten_when_there_are_too_many(known, monkeypatch):
    monkeypatch.setattr(eager, "_MOST", 2)
    eager.keep("linear", known.x[:2], known.weight, None, torch.zeros(2, 64), lambda: known.launched.append)
    assert again(known.x, known.weight, None) is None
    assert again(known.x[:2], known.weight, None) is not None
