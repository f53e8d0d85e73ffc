import pytest
import torch
from torch import nn

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.fake_impls.linear import linear

N, K = 40, 96


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest):
    with torch.autocast("cpu", dtype=request.param):
        yield request.param


def test_inputs_are_cast(packed, dtype):
    x, bias = torch.randn(3, K), torch.randn(N)
    out = linear(x, packed, bias)
    with torch.autocast("cpu", enabled=False):
        expected = linear(x.to(dtype), packed, bias.to(dtype))
    assert out.dtype == dtype and torch.equal(out, expected)


def test_results_and_gradients_have_the_dtypes_of_a_dense_linear(packed, dtype):
    weight = dequantize(packed, torch.float32)

    def dtypes(function, w) -> tuple[torch.dtype, ...]:
        x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
        out = function(x, w, bias)
        out.float().sum().backward()
        return out.dtype, x.grad.dtype, bias.grad.dtype

    assert dtypes(linear, packed) == dtypes(nn.functional.linear, weight)


def test_gradients_agree_with_a_dense_linear(packed, dtype):
    weight = dequantize(packed, torch.float32)
    x, bias = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True)
    found = torch.autograd.grad(linear(x, packed, bias).float().sum(), (x, bias))
    expected = torch.autograd.grad(nn.functional.linear(x, weight, bias).float().sum(), (x, bias))
    for f, e in zip(found, expected, strict=True):
        assert (f - e).norm() <= 1e-2 * e.norm()


def test_float64_is_not_cast(packed, dtype):
    with pytest.raises(ValueError, match=r"found torch\.float64"):
        linear(torch.randn(3, K).double(), packed)


def test_a_region_without_autocast_is_left_alone(packed, dtype):
    with torch.autocast("cpu", enabled=False):
        assert linear(torch.randn(3, K), packed).dtype == torch.float32


def test_it_compiles_under_autocast(packed, dtype):
    x = torch.randn(3, K)
    compiled = torch.compile(lambda x: linear(x, packed), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x, packed))
