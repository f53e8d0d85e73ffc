"""The grouped linear on a GPU against float64 of the exactly decoded weights."""

import pytest
import torch
from gpu.capture import captured
from torch import Tensor

from marlin_w4a16.fake_impls.grouped_linear import grouped_linear as op
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.kernels.grouped_linear import grouped, grouped_linear
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.target import Target
from mixtures.exact import exact_groups
from mixtures.oracle import draw_stack

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]

ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 129, 255, 257, 1000, 4096)
SHAPES = ((64, 64), (200, 1120), (96, 2880), (2880, 192), (1000, 96))
FORMATS = ("nvfp4", "mxfp4", "e4m3 group 32")
GATES = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}
DTYPES = pytest.mark.parametrize("dtype", GATES, ids=str)
LAUNCHES = (
    Launch(64, 16, 128, 1, 4, 4), Launch(64, 32, 128, 1, 4, 4), Launch(64, 64, 64, 1, 4, 4),
    Launch(128, 128, 64, 1, 8, 3),
)  # fmt: skip


def draw_offsets(rows: int, experts: int, tail: int = 0) -> Tensor:
    """Ends of groups of any size, some of none, with ``tail`` rows after the last."""
    return torch.cat((torch.randint(0, rows - tail + 1, (experts - 1,)).sort().values, torch.tensor([rows - tail])))


def assert_right(out: Tensor, weight, x: Tensor, offsets: Tensor) -> None:
    exact = exact_groups(weight, x, offsets)
    assert (out.dtype, out.shape) == (x.dtype, exact.shape) and not out.isnan().any()
    best = (exact.to(x.dtype).double() - exact).norm()
    assert (out.double() - exact).norm() <= max(GATES[x.dtype] * exact.norm(), 1.02 * best)
    assert not out[int(offsets[-1]) :].any()


@DTYPES
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("n, k", SHAPES)
def test_is_the_rounded_exact_product_for_all_numbers_of_rows(n, k, format, dtype, poisoned):
    weight = draw_stack(6, n, k, format)
    packed = pack(weight)
    for number, rows in enumerate(ROWS):
        tail = rows // 5 * (number % 2)
        offsets = draw_offsets(rows, 6, tail).to((torch.int32, torch.int64)[number % 2])
        x = torch.randn(rows, k, dtype=dtype)
        out = grouped_linear(x, packed, offsets)
        assert_right(out, weight, x, offsets)
        x[rows - tail :] = torch.nan  # what is past the last offset is not read
        assert torch.equal(out, grouped_linear(x, packed, offsets))


@DTYPES
@pytest.mark.parametrize("wgmma", [True, False], ids=["wgmma", "mma"])
@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_every_launch_of_the_portable_kernel_is_right_many_times(launch, wgmma, dtype, poisoned):
    if wgmma and not Target.of(torch.device("cuda")).hopper:
        pytest.skip("needs capability 9.0")
    weight = draw_stack(5, 328, 1120)
    packed, offsets, x = pack(weight), draw_offsets(400, 5, 30), torch.randn(400, 1120, dtype=dtype)

    def call() -> Tensor:
        out = torch.empty(400, 328, dtype=dtype)
        grouped(x, packed, offsets, out, launch, ptx=True, wgmma=wgmma)
        return out

    first = call()
    assert_right(first, weight, x, offsets)
    for _ in range(20):
        assert torch.equal(first, call())


@pytest.mark.parametrize("offsets", [[0, 0, 0], [0, 0, 40], [40, 40, 40], [0, 7, 7]], ids=str)
def test_empty_groups_and_rows_of_none(offsets, poisoned):
    weight, x = draw_stack(3, 96, 64), torch.randn(40, 64, dtype=torch.bfloat16)
    offsets = torch.tensor(offsets)
    assert_right(grouped_linear(x, pack(weight), offsets), weight, x, offsets)


def test_no_rows():
    packed = pack(draw_stack(3, 96, 64))
    out = grouped_linear(torch.randn(0, 64, dtype=torch.bfloat16), packed, torch.zeros(3, dtype=torch.int32))
    assert out.shape == (0, 96)


@pytest.mark.parametrize("rows", [5, 700])
def test_many_groups(rows, poisoned):
    weight, x = draw_stack(512, 64, 96), torch.randn(rows, 96, dtype=torch.bfloat16)
    offsets = draw_offsets(rows, 512)
    assert_right(grouped_linear(x, pack(weight), offsets), weight, x, offsets)


STRIDED = {
    "transposed": lambda x: x.t().contiguous().t(),
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "rows apart by an odd number": lambda x: torch.nn.functional.pad(x, (0, 3))[:, : x.shape[1]],
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "off the 16-byte grid": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("how", STRIDED)
@pytest.mark.parametrize("rows", [3, 100])
def test_any_strides(how, rows):
    packed, offsets = pack(draw_stack(3, 96, 160)), draw_offsets(rows, 3)
    x = STRIDED[how](torch.randn(rows, 160, dtype=torch.bfloat16))
    assert torch.equal(grouped_linear(x, packed, offsets), grouped_linear(x.contiguous(), packed, offsets))


def test_outputs_of_more_than_two_to_the_31_values():
    rows, n = 33_000, 1 << 16
    weight = draw_stack(2, n, 32)
    x, offsets = torch.randn(rows, 32, dtype=torch.bfloat16), torch.tensor([rows - 20, rows])
    out = grouped_linear(x, pack(weight), offsets)
    assert out.numel() > 1 << 31
    assert_right(out[-20:], weight, x[-20:], torch.tensor([0, 20]))


@pytest.mark.parametrize("rows", [3, 40, 700])
def test_a_captured_call_replays_with_new_rows_and_offsets(rows):
    packed, x = pack(draw_stack(8, 352, 1120)), torch.randn(rows, 1120, dtype=torch.bfloat16)
    offsets = draw_offsets(rows, 8)
    grouped_linear(x, packed, offsets)
    graph, out = captured(lambda: grouped_linear(x, packed, offsets))
    for turn in range(5):
        x.normal_()
        offsets.copy_(draw_offsets(rows, 8, turn % 3))
        out.fill_(torch.nan)
        graph.replay()
        assert not out.isnan().any() and torch.equal(out, grouped_linear(x, packed, offsets))


@pytest.mark.parametrize("rows", [3, 700])
def test_nothing_waits_for_the_gpu(rows):
    packed, x = pack(draw_stack(8, 96, 160)), torch.randn(rows, 160, dtype=torch.bfloat16)
    offsets = draw_offsets(rows, 8)
    first = grouped_linear(x, packed, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = grouped_linear(x, packed, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@DTYPES
@pytest.mark.parametrize("rows, grads", [(0, False), (9, False), (9, True), (200, True)])
def test_opcheck(rows, grads, dtype):
    packed, x = pack(draw_stack(4, 70, 160)), torch.randn(rows, 160, dtype=dtype, requires_grad=grads)
    args = (x, *weight_args(packed), draw_offsets(rows, 4))
    torch.library.opcheck(torch.ops.marlin_w4a16.grouped_linear.default, args)


def test_the_op_runs_the_kernels():
    packed, x, offsets = pack(draw_stack(4, 70, 160)), torch.randn(9, 160, dtype=torch.bfloat16), draw_offsets(9, 4)
    assert torch.equal(op(x, packed, offsets), grouped_linear(x, packed, offsets))
