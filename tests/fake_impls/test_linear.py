import contextlib
import re

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses import FakeTensorMode

from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.layout import PackedFP4
from narrow import matrix

OPS = torch.ops.marlin_w4a16
N, K = 40, 96
LEADING = [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
BOTH_KINDS = pytest.mark.parametrize("packed", ["nvfp4", "mxfp4"], indirect=True)


def strided(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[4, 6, K]`` in memory orders that a model may hand over."""
    if kind == "transposed":
        return torch.randn(K, 6, 4, dtype=dtype).permute(2, 1, 0)
    if kind == "sliced":
        return torch.randn(8, 6, 2 * K, dtype=dtype)[::2, :, ::2]
    return torch.randn(1, 6, K, dtype=dtype).expand(4, 6, K)


STRIDED = pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])


def assert_rounded_once(out: Tensor, x: Tensor, packed: PackedFP4, bias: Tensor) -> None:
    """Half a unit in the last place of ``out``, and what a float32 sum of K products may lose."""
    weight = packed.unpack().decode()
    exact = x.double() @ weight.T + bias.double()
    lost = 1e-6 * (x.double().abs() @ weight.abs().T + bias.double().abs())
    assert bool(((out.double() - exact).abs() <= torch.finfo(out.dtype).eps / 2 * exact.abs() + lost).all())


@BOTH_KINDS
@DTYPES
@pytest.mark.parametrize("leading", LEADING[:4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_exact_product_rounded_once(packed, dtype, leading, with_bias):
    x, bias = torch.randn(*leading, K, dtype=dtype), torch.randn(N, dtype=dtype) if with_bias else None
    out = linear(x, packed, bias)
    assert out.dtype == dtype and out.shape == (*leading, N)
    assert_rounded_once(out, x, packed, torch.zeros(N) if bias is None else bias)


@STRIDED
def test_strides_do_not_change_the_result(packed, strides):
    x = strided(strides)
    assert not x.is_contiguous()
    assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))


def test_no_tokens_give_no_rows(packed):
    assert linear(torch.empty(2, 0, K), packed, torch.ones(N)).shape == (2, 0, N)


@pytest.mark.parametrize(
    "dtype, leading",
    matrix(lambda i, j: (i + j) % 3 == 0, [torch.float32, torch.bfloat16, torch.float16], dict(enumerate(LEADING))),
)
def test_opcheck(packed, dtype, leading):
    x = torch.randn(*leading, K, dtype=dtype)
    for bias in (None, torch.randn(N, dtype=dtype)):
        torch.library.opcheck(OPS.linear.default, (x, *weight_args(packed), bias))
    grad = torch.randn(*leading, N, dtype=dtype)
    torch.library.opcheck(OPS.linear_grad_input.default, (grad, *weight_args(packed)))


@BOTH_KINDS
@STRIDED
def test_opcheck_with_gradients(packed, strides):
    x = strided(strides).requires_grad_()
    for bias in (None, torch.randn(N, requires_grad=True)):
        torch.library.opcheck(OPS.linear.default, (x, *weight_args(packed), bias))
    grad = torch.randn(3, N, requires_grad=True)
    torch.library.opcheck(OPS.linear_grad_input.default, (grad, *weight_args(packed)))


@STRIDED
@DTYPES
def test_the_fake_is_laid_out_like_the_real_result(packed, strides, dtype):
    for op, x in ((OPS.linear, strided(strides, dtype)), (OPS.linear_grad_input, strided(strides, dtype)[..., :N])):
        tail = (None,) if op is OPS.linear else ()
        real = op(x, *weight_args(packed), *tail)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = op(x, *weight_args(packed), *tail)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dynamic_axes", [(0,), (0, 1)])
def test_any_number_of_tokens_runs_one_compiled_graph(packed, dynamic_axes):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: linear(x, packed), backend=counter, fullgraph=True)
    for batch, tokens in ((2, 7), (5, 3), (9, 64)):
        x = torch.randn(batch, tokens if 1 in dynamic_axes else 7, K)
        for axis in dynamic_axes:
            torch._dynamo.mark_dynamic(x, axis)
        assert torch.equal(compiled(x), linear(x, packed))
    assert counter.frame_count == 1


WRONG = {
    "float64": ({"x": torch.ones(3, K).double()}, "input: found torch.float64, expected one of (torch.float16"),
    "integers": ({"x": torch.ones(3, K).int()}, "input: found torch.int32, expected one of (torch.float16"),
    "a scalar": ({"x": torch.ones(())}, "input: found a scalar, expected [..., k]"),
    "width": ({"x": torch.ones(3, K + 1)}, "input: found shape (3, 97), expected [..., k = 96]"),
    "x on meta": ({"x": torch.ones(3, K, device="meta")}, "words: found device cpu, expected that of the input, meta"),
    "bias' shape": ({"bias": torch.ones(K)}, "bias: found shape (96,), expected (40,)"),
    "bias' rank": ({"bias": torch.ones(1, N)}, "bias: found shape (1, 40), expected (40,)"),
    "bias' dtype": ({"bias": torch.ones(N).double()}, "bias: found torch.float64, expected one of (torch.float16"),
    "bias on meta": (
        {"bias": torch.ones(N, device="meta")},
        "bias: found device meta, expected that of the input, cpu",
    ),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("fake", [False, True])
def test_a_wrong_argument_is_named(packed, changes, message, fake):
    call = {"x": torch.ones(3, K), "bias": None} | changes
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with pytest.raises(ValueError, match=re.escape(f"marlin_w4a16::linear: {message}")), mode:
        linear(call["x"], packed, call["bias"])


def test_a_gradient_of_another_width_is_named(packed):
    message = "marlin_w4a16::linear_grad_input: input: found shape (3, 96), expected [..., n = 40]"
    with pytest.raises(ValueError, match=re.escape(message)):
        OPS.linear_grad_input(torch.ones(3, K), *weight_args(packed))
