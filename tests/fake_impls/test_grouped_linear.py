"""The op ``grouped_linear`` on a CPU, against float64 from the exactly decoded weights."""

import contextlib
import re
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward
from torch import Tensor
from torch._subclasses import FakeTensorMode

from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import pack
from mixtures.oracle import draw_stack, matrix

OPS = torch.ops.marlin_w4a16
N, K, EXPERTS = 40, 96, 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
FORMATS = pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "e4m3 group 32"])
OFFSETS = {
    "some each": [2, 5, 6, 9], "empty experts": [0, 4, 4, 9], "all on the first": [9, 9, 9, 9],
    "all on the last": [0, 0, 0, 9], "rows past the end": [1, 1, 3, 5], "none": [0, 0, 0, 0],
}  # fmt: skip
EVERY_OFFSET = pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)


def ends(offsets: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(offsets, dtype=dtype)


def exact(x: Tensor, weight: FP4Weight, offsets: Tensor, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """In float64, zeros past the last offset, and the sums of magnitudes; ``transposed`` for the gradient."""
    dense = [matrix(weight, expert) for expert in range(len(offsets))]
    dense, x, start = [w if transposed else w.T for w in dense], x.double(), 0
    out = torch.zeros(2, len(x), dense[0].shape[1], dtype=torch.float64)
    for w, stop in zip(dense, offsets.tolist(), strict=True):
        out[0, start:stop], out[1, start:stop] = x[start:stop] @ w, x[start:stop].abs() @ w.abs()
        start = stop
    return out[0], out[1]


def assert_rounded_once(out: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Half a unit in the last place, and what a float32 sum may lose."""
    limit = torch.finfo(out.dtype).eps / 2 * exact.abs() + 1e-6 * magnitude
    assert out.shape == exact.shape and bool(((out.double() - exact).abs() <= limit).all())


@FORMATS
@DTYPES
@EVERY_OFFSET
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_each_group_meets_its_expert(format, dtype, offsets, index):
    weight, x, offsets = draw_stack(EXPERTS, N, K, format), torch.randn(9, K, dtype=dtype), ends(offsets, index)
    out = grouped_linear(x, pack(weight), offsets)
    assert out.dtype == dtype
    assert_rounded_once(out, *exact(x, weight, offsets))
    assert torch.equal(out[offsets[-1] :], torch.zeros_like(out[offsets[-1] :]))


@pytest.mark.parametrize("experts, rows", [(1, 0), (1, 1), (512, 37), (64, 1000)])
def test_any_number_of_experts_and_rows(experts, rows):
    weight, x = draw_stack(experts, 32, 32), torch.randn(rows, 32)
    offsets = torch.randint(rows + 1, (experts,)).sort().values
    assert_rounded_once(grouped_linear(x, pack(weight), offsets), *exact(x, weight, offsets))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_no_group_holds_is_not_read(poison):
    packed, x, offsets = pack(draw_stack(EXPERTS, N, K)), torch.randn(9, K), ends([2, 2, 5, 5])
    clean = grouped_linear(x, packed, offsets)
    x[5:] = poison
    packed.multiplier[1::2] = poison
    assert torch.equal(grouped_linear(x, packed, offsets), clean) and bool(clean.isfinite().all())


@pytest.mark.parametrize("strides", ["transposed", "sliced", "expanded"])
def test_strides_do_not_change_the_result(strides):
    packed, offsets = pack(draw_stack(EXPERTS, N, K)), ends([2, 5, 6, 9])
    x = {
        "transposed": torch.randn(K, 9).T,
        "sliced": torch.randn(18, 2 * K)[::2, ::2],
        "expanded": torch.randn(1, K).expand(9, K),
    }[strides]
    wide = torch.stack((offsets, offsets + 7), 1)[:, 0]
    assert not x.is_contiguous() and not wide.is_contiguous()
    assert torch.equal(grouped_linear(x, packed, wide), grouped_linear(x.contiguous(), packed, offsets))


@FORMATS
@EVERY_OFFSET
@DTYPES
def test_the_gradient_is_that_of_the_dense_product(format, offsets, dtype):
    weight, offsets = draw_stack(EXPERTS, N, K, format), ends(offsets)
    x, seed = torch.randn(9, K, dtype=dtype, requires_grad=True), torch.randn(9, N, dtype=dtype)
    (found,) = torch.autograd.grad(grouped_linear(x, pack(weight), offsets), x, seed)
    assert found.dtype == dtype
    assert_rounded_once(found, *exact(seed, weight, offsets, transposed=True))


def test_a_gradient_can_be_differentiated_again():
    weight, offsets = draw_stack(EXPERTS, N, K), ends([2, 5, 6, 9])
    dense = torch.stack([matrix(weight, expert) for expert in range(EXPERTS)])

    def penalty(out: Tensor, x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    x = torch.randn(9, K, requires_grad=True)
    found, double = penalty(grouped_linear(x, pack(weight), offsets), x), x.detach().double().requires_grad_()
    expected = penalty(torch.cat([p @ w.T for p, w in zip(double.split([2, 3, 1, 3]), dense, strict=True)]), double)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_packed_weight_gets_no_gradient():
    words, scales, multiplier, *rest = weight_args(pack(draw_stack(EXPERTS, N, K)))
    x, multiplier = torch.randn(9, K, requires_grad=True), multiplier.requires_grad_()
    out = OPS.grouped_linear(x, words, scales, multiplier, *rest, ends([2, 5, 6, 9]))
    assert torch.autograd.grad(out.sum(), (x, multiplier), allow_unused=True)[1] is None


def test_a_tangent_is_refused():
    x, packed = torch.randn(9, K), pack(draw_stack(EXPERTS, N, K))
    match = "marlin_w4a16::grouped_linear: found an input with a tangent"
    with forward.dual_level(), pytest.raises(NotImplementedError, match=match):
        grouped_linear(forward.make_dual(x, x), packed, ends([2, 5, 6, 9]))


@DTYPES
@pytest.mark.parametrize("rows", [0, 9])
@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(dtype, rows, grads):
    weight, offsets = weight_args(pack(draw_stack(EXPERTS, N, K))), ends([0, rows // 2, rows // 2, rows])
    for op, width in ((OPS.grouped_linear, K), (OPS.grouped_linear_grad_input, N)):
        x = torch.randn(rows, width, dtype=dtype, requires_grad=grads)
        torch.library.opcheck(op.default, (x, *weight, offsets))


@DTYPES
def test_the_fakes_are_laid_out_like_the_real_results(dtype):
    weight, offsets = weight_args(pack(draw_stack(EXPERTS, N, K))), ends([2, 5, 6, 9])
    for op, width in ((OPS.grouped_linear, K), (OPS.grouped_linear_grad_input, N)):
        x = torch.randn(width, 9, dtype=dtype).T
        real = op(x, *weight, offsets)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = op(x, *weight, offsets)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_any_number_of_rows_runs_one_compiled_graph(backend):
    packed, counter = pack(draw_stack(EXPERTS, N, K)), torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda x, ends: grouped_linear(x, packed, ends), backend=counter, fullgraph=True)
    for rows in (7, 3, 64):
        x, offsets = torch.randn(rows, K, requires_grad=True), ends([1, 1, rows - 1, rows])
        torch._dynamo.mark_dynamic(x, 0)
        out, expected = compiled(x, offsets), grouped_linear(x, packed, offsets)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (out, expected)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_the_input(dtype):
    packed, x, offsets = pack(draw_stack(EXPERTS, N, K)), torch.randn(9, K, requires_grad=True), ends([2, 5, 6, 9])
    with torch.autocast("cpu", dtype=dtype):
        out = grouped_linear(x, packed, offsets)
    assert out.dtype == dtype and torch.equal(out, grouped_linear(x.to(dtype), packed, offsets))
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32 and bool(x.grad.any())


WRONG = {
    "float64": ({"x": torch.ones(3, K).double()}, "input: found torch.float64, expected one of (torch.float16"),
    "width": ({"x": torch.ones(3, N)}, "input: found shape (3, 40), expected [rows, k = 96]"),
    "a batch": ({"x": torch.ones(1, 3, K)}, "input: found shape (1, 3, 96), expected [rows, k = 96]"),
    "x on meta": ({"x": torch.ones(3, K, device="meta")}, "words: found device cpu, expected that of the input, meta"),
    "one matrix": ({"packed": lambda p: p.matrix(0)}, "words: found shape (1, 2, 512), expected [experts, ...]"),
    "fewer offsets": ({"offsets": ends([1, 3])}, "offsets: found shape (2,), expected (4,)"),
    "float offsets": ({"offsets": torch.ones(4)}, "offsets: found torch.float32, expected torch.int32 or torch.int64"),
    "offsets on meta": (
        {"offsets": torch.ones(4, device="meta").int()},
        "offsets: found device meta, expected that of the input, cpu",
    ),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("fake", [False, True])
def test_a_wrong_argument_is_named(changes, message, fake):
    packed = pack(draw_stack(EXPERTS, N, K))
    call: dict[str, Any] = {"x": torch.ones(3, K), "packed": packed, "offsets": ends([1, 1, 2, 3])} | changes
    call["packed"] = call["packed"](packed) if callable(call["packed"]) else packed
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with pytest.raises(ValueError, match=re.escape(f"marlin_w4a16::grouped_linear: {message}")), mode:
        grouped_linear(**call)


def test_a_gradient_of_another_width_is_named():
    message = "marlin_w4a16::grouped_linear_grad_input: input: found shape (3, 96), expected [rows, n = 40]"
    with pytest.raises(ValueError, match=re.escape(message)):
        OPS.grouped_linear_grad_input(
            torch.ones(3, K), *weight_args(pack(draw_stack(EXPERTS, N, K))), ends([1, 1, 2, 3])
        )
