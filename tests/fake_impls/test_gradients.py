import copy

import pytest
import torch
import torch.autograd.forward_ad as forward
from torch import Tensor, nn

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.linear import linear

N, K = 40, 96
BOTH_KINDS = pytest.mark.parametrize("packed", ["nvfp4", "mxfp4"], indirect=True)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, K, dtype=dtype).requires_grad_(), torch.randn(N, dtype=dtype).requires_grad_()


@BOTH_KINDS
def test_gradients_of_input_and_bias_are_those_of_the_dense_linear(packed):
    x, bias = inputs()
    weight, seed = dequantize(packed, torch.float32), torch.randn(2, 3, N)
    found = torch.autograd.grad(linear(x, packed, bias), (x, bias), seed)
    expected = torch.autograd.grad(nn.functional.linear(x, weight, bias), (x, bias), seed)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_gradients_are_accumulated_in_float32(packed, dtype):
    x, bias = inputs(dtype)
    seed = torch.randn(2, 3, N, dtype=dtype)
    grad_x, grad_bias = torch.autograd.grad(linear(x, packed, bias), (x, bias), seed)
    exact = seed.double() @ packed.unpack().decode()
    lost = 1e-6 * (seed.double().abs() @ packed.unpack().decode().abs())
    assert bool(((grad_x - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + lost).all())
    assert torch.equal(grad_bias, seed.double().sum((0, 1)).to(dtype))


def test_only_what_asks_for_a_gradient_gets_one(packed):
    x, bias = inputs()
    linear(x.detach(), packed, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((N,), 6.0))
    linear(x, packed, bias.detach()).sum().backward()
    assert x.grad is not None and torch.equal(bias.grad, torch.full((N,), 6.0))


def test_the_packed_weight_gets_no_gradient(packed):
    x, _ = inputs()
    words, scales, multiplier, *rest = weight_args(packed)
    multiplier.requires_grad_()
    out = torch.ops.marlin_w4a16.linear(x, words, scales, multiplier, *rest, None)
    assert torch.autograd.grad(out.sum(), (x, multiplier), allow_unused=True)[1] is None


def test_a_tangent_of_input_or_bias_is_refused(packed):
    x, bias = (t.detach() for t in inputs())
    with forward.dual_level():
        linear(x, packed, bias)
        for dual in ((forward.make_dual(x, x), bias), (x, forward.make_dual(bias, bias))):
            with pytest.raises(NotImplementedError, match="marlin_w4a16::linear: found an input with a tangent"):
                linear(dual[0], packed, dual[1])
            with pytest.raises(RuntimeError, match="jvp"):  # of PyTorch
                linear(dual[0].requires_grad_(), packed, dual[1])


def test_gradients_of_no_tokens_are_zeros(packed):
    x, bias = torch.empty(0, K, requires_grad=True), torch.ones(N, requires_grad=True)
    linear(x, packed, bias).sum().backward()
    assert x.grad.shape == (0, K) and torch.equal(bias.grad, torch.zeros(N))


def test_a_gradient_can_be_differentiated_again(packed):
    weight = dequantize(packed, torch.float32)

    def penalty(out: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(out.pow(3).sum(), (x, bias), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, bias))

    x, bias = inputs()
    found = penalty(linear(x, packed, bias), x, bias)
    expected = penalty(nn.functional.linear(x, weight, bias), x, bias)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-5 * e.norm()


class Adapted(nn.Module):
    """A norm before an FP4 linear and a LoRA beside it: what is trained around a frozen weight."""

    def __init__(self, packed):
        super().__init__()
        self.packed = packed
        self.norm = nn.RMSNorm(K)
        self.bias = nn.Parameter(torch.randn(N))
        self.down, self.up = nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return linear(h, self.packed, self.bias) + self.up(self.down(h))


def test_a_compiled_training_step_has_the_gradients_of_eager(packed):
    eager = Adapted(packed)
    model, x = copy.deepcopy(eager), torch.randn(5, K)
    eager(x).pow(2).sum().backward()
    torch.compile(model, fullgraph=True)(x).pow(2).sum().backward()
    for (name, p), (_, q) in zip(eager.named_parameters(), model.named_parameters(), strict=True):
        assert q.grad.abs().sum() > 0, name
        assert (q.grad - p.grad).norm() <= 1e-5 * p.grad.norm(), name
