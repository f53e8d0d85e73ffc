"""The gradient of a linear's input on a GPU against the float64 product with the exactly decoded weight."""

import itertools
from dataclasses import replace

import pytest
import torch
from gpu.capture import captured
from torch import Tensor

from kernels.plans import grad_launches
from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels import grad_input as kernels
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.grad_input import linear_grad_input
from marlin_w4a16.kernels.grad_launch import GradLaunch
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.portable.grad_input import through_dense

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]

TOKENS = (0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096)
SHAPES = ((1, 32), (64, 64), (70, 160), (2880, 96), (1120, 224), (4064, 992), (512, 4640))
FORMATS = (("e4m3", 16), ("e8m0", 32), ("e4m3", 32), ("e8m0", 16))
DTYPES = (torch.bfloat16, torch.float16)
# Relative L2 errors of results that are rounded once, and of those of scaled gradients that were rounded before.
ONCE = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}
TWICE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


def draw_weight(n: int, k: int, kind: str = "e4m3", group: int = 16, same: bool = False) -> FP4Weight:
    """A weight with negative scales; its rows have one multiplier, or several of any sign and some zeros."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scales = torch.randint(0, 256, (n, k // group), dtype=torch.uint8)
    if kind == "e4m3":
        scales[(scales & 0x7F) == 0x7F] = 0x01
    else:
        scales = scales % 37 + 104
    factor = 2.0**-9 if kind == "e4m3" else 2.0**-14
    rows = torch.randn(n) * (torch.arange(n) % 5 != 1)
    return FP4Weight(codes, scales, (torch.full((n,), 1.37) if same else rows) * factor, kind, group)


def draw_grad(m: int, n: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(m, n) * 2**-5).to(dtype)


def assert_near(out: Tensor, grad: Tensor, weight: FP4Weight, same: bool) -> None:
    """Within the gate, or, where few outputs make that a matter of luck, as near as rounding the exact result."""
    exact = grad.double() @ weight.decode()
    assert out.shape == exact.shape and out.dtype == grad.dtype and not out.isnan().any()
    size = exact.norm()
    best = ((exact.to(out.dtype).double() - exact).norm() / size).item()
    gate = (ONCE if same else TWICE)[out.dtype]
    few = out.numel() < 3000 or weight.n < 16
    assert ((out.double() - exact).norm() / size).item() <= max(gate * (2 if few and not same else 1), 1.05 * best)


def dense(grad: Tensor, packed: PackedFP4) -> Tensor:
    out = torch.empty(grad.shape[0], packed.k, dtype=grad.dtype)
    through_dense(grad, packed, out)
    return out


@pytest.mark.parametrize("same", [True, False], ids=["one multiplier", "several"])
@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("kind, group", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_rounded_exact_product_for_all_token_counts(n, k, kind, group, dtype, same, poisoned):
    weight = draw_weight(n, k, kind, group, same)
    packed = pack(weight)
    for m in TOKENS:
        grad = draw_grad(m, n, dtype)
        out = torch.ops.marlin_w4a16.linear_grad_input(grad, *weight_args(packed))
        if m == 0:
            assert out.shape == (0, k)
            continue
        assert_near(out, grad, weight, same)
        assert torch.equal(out, linear_grad_input(grad, packed)), "another kernel, or other bits"


LAUNCHES = [
    replace(launch, split_n=split)
    for launch in {replace(launch, split_n=1) for launch in grad_launches((9, 0)) + grad_launches((8, 0))}
    for split in (1, 3, 4)
]


@pytest.mark.parametrize("launch", sorted(LAUNCHES, key=str), ids=str)
@pytest.mark.parametrize("kind, group", FORMATS[:2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_launch_is_right_many_times(launch: GradLaunch, kind, group, dtype, poisoned):
    weight = draw_weight(2080, 1120, kind, group, True)
    packed = pack(weight)
    for m in (launch.block_m, 2 * launch.block_m + 3):
        grad = draw_grad(m, 2080, dtype)
        first = linear_grad_input(grad, packed, launch)
        assert_near(first, grad, weight, True)
        for _ in range(20):
            assert torch.equal(first, linear_grad_input(grad, packed, launch))


@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize("scratch", [1, 1 << 16, 1 << 20])
def test_scratch_of_any_size_gives_the_same(m, scratch, monkeypatch, poisoned):
    from marlin_w4a16.kernels.portable import grad_input

    weight = draw_weight(1120, 1008)
    packed, grad = pack(weight), draw_grad(m, 1120, torch.bfloat16)
    monkeypatch.setattr(grad_input, "_WEIGHT_BYTES", scratch)
    monkeypatch.setattr(grad_input, "_PARTS_BYTES", scratch)
    assert_near(dense(grad, packed), grad, weight, False)


STRIDED = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows apart by an odd number": lambda x: torch.nn.functional.pad(x, (0, 3))[:, : x.shape[1]],
    "beside what is no number": lambda x: torch.nn.functional.pad(x, (8, 8), value=torch.nan)[:, 8 : 8 + x.shape[1]],
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "off the 16-byte grid": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("m", [1, 5, 33, 300])
@pytest.mark.parametrize("n", [1120, 1090])
def test_any_strides(how, m, n):
    packed = pack(draw_weight(n, 208))
    grad = STRIDED[how](draw_grad(m, n, torch.bfloat16))
    assert torch.equal(linear_grad_input(grad, packed), linear_grad_input(grad.contiguous(), packed))


@pytest.mark.parametrize("run", [linear_grad_input, dense], ids=["planned", "dense"])
@pytest.mark.parametrize("m", [1, 40, 129])
def test_a_slice_of_a_packed_weight(run, m):
    packed = pack(draw_weight(256, 1024))
    tiles = (slice(1, 3), slice(4, 12))
    part = replace(
        packed,
        words=packed.words[tiles],
        scales=packed.scales[tiles],
        multiplier=packed.multiplier[64:192],
        n=128,
        k=512,
    )
    grad = draw_grad(m, 128, torch.bfloat16)
    assert_near(run(grad, part), grad, part.unpack(), False)


MULTIPLIERS = {
    "huge": lambda n: torch.randn(n) * 1e30,
    "tiny": lambda n: torch.randn(n) * 1e-30,
    "far apart": lambda n: torch.tensor([1e20, 1.0, 1e-20]).repeat(n)[:n],
    "negative": lambda n: torch.full((n,), -1e-3),
    "zeros": lambda n: torch.zeros(n),
    "all but one zeros": lambda n: torch.zeros(n).index_fill(0, torch.tensor(n - 1), -3e-4),
    "merged": lambda n: torch.tensor([1e-4, 2.14e-4, 1.7e-4]).repeat_interleave(-(-n // 3))[:n],
}


@pytest.mark.parametrize("run", [linear_grad_input, dense], ids=["planned", "dense"])
@pytest.mark.parametrize("name", MULTIPLIERS)
@pytest.mark.parametrize("m", [3, 100])
def test_any_multipliers(name, m, run, poisoned):
    weight = replace(draw_weight(1090, 208), multiplier=MULTIPLIERS[name](1090))
    grad = draw_grad(m, 1090, torch.bfloat16)
    out = run(grad, pack(weight))
    exact = grad.double() @ weight.decode()
    gate = ONCE if name in ("negative", "far apart", "all but one zeros") else TWICE
    best = (exact.to(out.dtype).double() - exact).norm()
    assert not out.isnan().any()
    assert (out.double() - exact).norm() <= max(gate[grad.dtype] * exact.norm(), 1.02 * best)


@pytest.mark.parametrize("m", [3, 100, 300])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 6e4])
def test_float16_keeps_small_gradients_of_small_multipliers(size, m):
    """Their products are below what float16 holds; the sums are not."""
    weight = draw_weight(1120, 208)
    multiplier = torch.tensor([1e-3, 1e-6]).repeat(560)
    weight = replace(weight, multiplier=multiplier / (size if size < 1 else size * 100))
    grad = (torch.rand(m, 1120) * size).half()
    grad[0, ::2] = 0  # a token of the small ones alone
    exact = grad.double() @ weight.decode()
    out = linear_grad_input(grad, pack(weight))
    lost = 2.0**-25 * exact.shape[1] ** 0.5 / exact.norm(dim=1)
    assert ((out.double() - exact).norm(dim=1) / exact.norm(dim=1)).le(6e-4 + lost).all()


@pytest.mark.parametrize("m", [4, 300])
def test_what_is_no_number_stays_in_its_token(m):
    grad = draw_grad(m, 70, torch.bfloat16)
    grad[1, 3], grad[2, 69] = torch.nan, torch.inf
    out = linear_grad_input(grad, pack(draw_weight(70, 96, same=True)))
    assert out[[0, 3]].isfinite().all() and not out[[1, 2]].isfinite().any()


@pytest.mark.parametrize("m", [1, 16, 64, 200, 300])
def test_a_captured_call_replays_with_new_contents_and_multipliers(m):
    packed, grad = pack(draw_weight(1088, 2048)), draw_grad(m, 1088, torch.bfloat16)
    linear_grad_input(grad, packed)
    graph, out = captured(lambda: linear_grad_input(grad, packed))
    for _ in range(3):
        grad.normal_()
        packed.multiplier.normal_()
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, linear_grad_input(grad, packed))


@pytest.mark.parametrize("m", [3, 300])
def test_nothing_waits_for_the_gpu(m):
    packed, grad = pack(draw_weight(1088, 2048)), draw_grad(m, 1088, torch.bfloat16)
    linear_grad_input(grad, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_grad_input(grad, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("m", [5, 300])
def test_autograd_gives_it(m, dtype):
    weight, x = draw_weight(1120, 208), torch.randn(2, m, 208, dtype=dtype, requires_grad=True)
    grad = torch.randn(1120, m, 2, dtype=dtype).permute(2, 1, 0)
    linear(x, pack(weight)).backward(grad)
    exact = grad.double() @ weight.decode()
    gate = {**TWICE, torch.float32: 1e-6}[dtype]
    assert x.grad.dtype == dtype and (x.grad.double() - exact).norm() <= gate * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_grouped_rows_is_that_of_their_experts(dtype):
    weights = [draw_weight(200, 96) for _ in range(3)]
    parts = [pack(weight) for weight in weights]
    words, scales, multiplier = (
        torch.stack([getattr(p, name) for p in parts]) for name in ("words", "scales", "multiplier")
    )
    stack = replace(parts[0], words=words, scales=scales, multiplier=multiplier)
    x, grad = torch.randn(50, 96, dtype=dtype, requires_grad=True), torch.randn(50, 200, dtype=dtype)
    grouped_linear(x, stack, torch.tensor([20, 20, 45])).backward(grad)
    exact = torch.cat((grad[:20].double() @ weights[0].decode(), grad[20:45].double() @ weights[2].decode()))
    assert not x.grad[45:].any() and (x.grad[:45].double() - exact).norm() <= TWICE[dtype] * exact.norm()


def test_the_op_runs_the_kernels_for_16_bits_only(monkeypatch):
    packed, calls = pack(draw_weight(70, 96)), []
    monkeypatch.setattr(kernels, "grad_input_into", lambda grad, *_: calls.append(grad.dtype))
    for dtype in (*DTYPES, torch.float32):
        torch.ops.marlin_w4a16.linear_grad_input(torch.ones(2, 70, dtype=dtype), *weight_args(packed))
    assert calls == list(DTYPES)


def test_offsets_beyond_two_to_the_31():
    m, n, k = 17000, 64, 1 << 17
    weight = draw_weight(n, k)
    packed, grad = pack(weight), draw_grad(m, n, torch.bfloat16)
    launch = GradLaunch(128, 128, 64, 1, 8, 3)
    for out in (linear_grad_input(grad, packed), linear_grad_input(grad, packed, launch)):
        assert out.numel() > 1 << 31
        assert_near(out[-16:], grad[-16:], weight, False)
        del out


@pytest.mark.parametrize("m, dtype", list(itertools.product((0, 3, 300), DTYPES)))
def test_opcheck(m, dtype):
    grad = torch.randn(m, 70, dtype=dtype, requires_grad=True)
    torch.library.opcheck(
        torch.ops.marlin_w4a16.linear_grad_input.default, (grad, *weight_args(pack(draw_weight(70, 160))))
    )


def test_scratch_is_bounded():
    packed = pack(draw_weight(16384, 16384))
    grad = torch.randn(8192, 16384, dtype=torch.bfloat16)
    linear_grad_input(grad, packed)  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    out = linear_grad_input(grad, packed)
    torch.cuda.synchronize()
    scratch = torch.cuda.max_memory_allocated() - start - out.nbytes - grad.nbytes
    assert scratch <= (256 + 2 * 64 + 1) << 20
