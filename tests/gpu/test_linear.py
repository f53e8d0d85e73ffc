"""The linear kernels on a GPU against the float64 product of the exactly decoded weight."""

import itertools
from dataclasses import replace

import pytest
import torch

from kernels.plans import hopper_launches, launches, named
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.launch import Launch, Rows, Stream, plan_dense, plan_linear
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.linear import linear as kernel
from marlin_w4a16.kernels.target import Target

pytestmark = pytest.mark.gpu

TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096)
SHAPES = ((1, 32), (64, 64), (70, 160), (96, 2880), (200, 1120), (1000, 4064), (2880, 2880), (4640, 512))
FORMATS = (("e4m3", 16), ("e8m0", 32), ("e4m3", 32), ("e8m0", 16))
GATES = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}
HOPPER = torch.cuda.is_available() and Target.of(torch.device("cuda")).gluon
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs capability 9.0 and a Triton whose Gluon is known")


def random_weight(n: int, k: int, kind: str, group: int, dtype: torch.dtype = torch.bfloat16) -> FP4Weight:
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(0, 256, (n, k // group), dtype=torch.uint8, device="cuda")
    if kind == "e4m3":
        scales[(scales & 0x7F) == 0x7F] = 0x01
        multiplier = (torch.rand(n, device="cuda") + 0.5) * 2.0**-9
    else:
        scales, multiplier = scales % 37 + 104, (torch.rand(n, device="cuda") + 0.5) * 2.0**-14
    return FP4Weight(codes, scales, multiplier, kind, group)


def assert_rounded_product(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Within the gate, or, where few outputs make that a matter of luck, as near as rounding the exact result."""
    assert not out.isnan().any()
    size = exact.norm()
    best = ((exact.to(out.dtype).double() - exact).norm() / size).item()
    assert ((out.double() - exact).norm() / size).item() <= max(GATES[out.dtype], 1.02 * best)


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("kind, group", FORMATS)
@pytest.mark.parametrize("dtype", GATES)
def test_is_the_rounded_exact_product_for_all_token_counts(n, k, kind, group, dtype, poisoned):
    weight = random_weight(n, k, kind, group)
    packed, dense = pack(weight), weight.decode()
    bias = torch.randn(n, device="cuda", dtype=dtype)
    for i, m in enumerate(TOKENS):
        x, with_bias = torch.randn(m, k, device="cuda", dtype=dtype) * 2**-5, bias if i % 2 else None
        out = linear(x, packed, with_bias)
        assert out.shape == (m, n) and out.dtype == dtype
        exact = x.double() @ dense.T + (0 if with_bias is None else bias.double())
        if m:
            assert_rounded_product(out, exact)
        assert torch.equal(out, linear(x, packed, with_bias))


@pytest.mark.parametrize("launch", launches((9, 0)) + launches((8, 0)), ids=str)
@pytest.mark.parametrize("kind, group", FORMATS[:2])
def test_every_launch_of_the_tables_is_right_many_times(launch: Launch, kind, group, poisoned):
    weight = random_weight(1088, 4096, kind, group)
    packed, dense = pack(weight), weight.decode()
    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16) * 2**-5
    first = kernel(x, packed, None, launch)
    assert_rounded_product(first, x.double() @ dense.T)
    for _ in range(20):
        assert torch.equal(first, kernel(x, packed, None, launch))


def assert_right_many_times(weight: FP4Weight, m: int, dtype: torch.dtype, launch: Launch | Rows | Stream) -> None:
    packed, x = pack(weight), torch.randn(m, weight.k, device="cuda", dtype=dtype) * 2**-5
    bias = torch.randn(weight.n, device="cuda", dtype=dtype)
    first = kernel(x, packed, bias, launch)
    assert_rounded_product(first, x.double() @ weight.decode().T + bias.double())
    for _ in range(20):
        assert torch.equal(first, kernel(x, packed, bias, launch))


def hopper(kernel_type: type) -> list:
    """Every launch the plan of Hopper has, in the form each kernel is compiled in, once for each dtype."""
    forms = [(*form, dtype) for form, dtype in zip(FORMATS[:2], GATES, strict=True)]
    return [
        pytest.param(launch, even, *form, id=named(launch, "even" if even else "uneven", *form))
        for (launch, even), form in itertools.product(hopper_launches(), forms)
        if isinstance(launch, kernel_type)
    ]


@on_hopper
@pytest.mark.parametrize("launch, even, kind, group, dtype", hopper(Rows))
def test_every_launch_for_few_tokens_is_right_many_times(launch: Rows, even, kind, group, dtype, poisoned):
    """The last block of rows and the last tile of columns are cut, and programs take two or three blocks."""
    turn, turns = launch.steps * launch.num_warps * 64, launch.stages if launch.resident else launch.stages + 2
    weight = random_weight(9 * launch.rows + 5, turn * turns - (32 if even else 5 * 64 - 32), kind, group, dtype)
    for m in (1, launch.block_m - 1, launch.block_m):
        for programs in (1, 4, 10):
            assert_right_many_times(weight, m, dtype, replace(launch, programs=programs))


@on_hopper
@pytest.mark.parametrize("launch, even, kind, group, dtype", hopper(Stream))
def test_every_launch_for_more_tokens_is_right_many_times(launch: Stream, even, kind, group, dtype, poisoned):
    """12 tiles of the output, cut at their ends, in 12 units each: whole, in equal and in unequal parts."""
    weight = random_weight(3 * launch.rows + 5, 64 * launch.tiles * 12 - 224, kind, group, dtype)
    for m in (2 * launch.block_m + 3, launch.block_m - 1):
        for programs in (1, 4, 5, 7, 24, 48):
            assert_right_many_times(weight, m, dtype, replace(launch, programs=programs, sharers=programs))
    assert_right_many_times(weight, 2 * launch.block_m + 3, dtype, replace(launch, programs=132, sharers=132))


@on_hopper
@pytest.mark.parametrize("launch, even, kind, group, dtype", hopper(Stream))
def test_waves_of_whole_tiles_are_right(launch: Stream, even, kind, group, dtype, poisoned):
    """21 tiles: a last wave that is not shared, one that is too short for it, one that some share evenly."""
    for programs, sharers, units in ((11, 1, 2), (8, 8, 1), (9, 6, 2)):
        weight = random_weight(6 * launch.rows + 5, 64 * launch.tiles * units - 32, kind, group, dtype)
        planned = replace(launch, programs=programs, sharers=sharers)
        assert_right_many_times(weight, 2 * launch.block_m + 3, dtype, planned)


@on_hopper
@pytest.mark.parametrize("launch", [Rows(16, 16, 16, 1, 3, False, 2), Rows(32, 8, 16, 2, 3, False, 2)], ids=named)
@pytest.mark.parametrize("k", [32, 1024, 2048, 2080])
def test_a_ring_longer_than_a_block_is_right(launch, k, poisoned):
    assert_right_many_times(random_weight(200, k, "e4m3", 16), 5, torch.bfloat16, launch)


@pytest.mark.parametrize("m", [1, 9, 16])
@pytest.mark.parametrize("n, k", SHAPES[::2])
@pytest.mark.parametrize("kind, group", FORMATS[:2])
@pytest.mark.parametrize("dtype", GATES)
def test_the_portable_kernel_stays_right_where_gluon_has_its_place(m, n, k, kind, group, dtype, poisoned):
    launch = plan_linear(replace(Target.of(torch.device("cuda")), capability=(8, 0)), m, n, k)
    assert_right_many_times(random_weight(n, k, kind, group), m, dtype, launch)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "every second column":
        return x.repeat_interleave(2, 1)[:, ::2]
    if how == "rows apart":
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    if how == "rows far apart":
        return torch.empty(len(x), 1 << 18, dtype=x.dtype, device=x.device)[:, 8 : 8 + x.shape[1]].copy_(x)
    if how == "rows apart by an odd number":
        return torch.nn.functional.pad(x, (0, 3))[:, : x.shape[1]]
    return x[:1].expand(x.shape)


@pytest.mark.parametrize(
    "how",
    [
        "transposed", "every second column", "rows apart", "rows far apart", "rows apart by an odd number",
        "one row repeated",
    ],
)  # fmt: skip
@pytest.mark.parametrize("m", [1, 5, 16, 33, 300, 2100])
@pytest.mark.parametrize("k", [1120, 16384])  # x is kept whole, or passes through a ring
def test_any_strides(how, m, k):
    weight = random_weight(200, k, "e4m3", 16)
    packed = pack(weight)
    x = strided(torch.randn(m, k, device="cuda", dtype=torch.bfloat16), how)
    out = linear(x, packed)
    assert_rounded_product(out, x.double() @ weight.decode().T)
    if HOPPER or not plan_dense(m):  # cuBLAS picks its kernel by the strides
        assert torch.equal(out, linear(x.contiguous(), packed))


@pytest.mark.parametrize("m, apart", [(9, 1 << 28), (33, 1 << 26)])
@pytest.mark.parametrize("k", [1120, 16384])
def test_rows_of_x_more_than_two_to_the_31_elements_apart(m, apart, k):
    packed = pack(random_weight(200, k, "e4m3", 16))
    x = torch.empty(m, apart, device="cuda", dtype=torch.bfloat16)[:, :k].normal_()
    assert (m - 1) * x.stride(0) >= 1 << 31
    assert torch.equal(linear(x, packed), linear(x.contiguous(), packed))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_inputs_off_the_16_byte_grid(offset):
    packed = pack(random_weight(200, 1120, "e4m3", 16))
    x = torch.randn(9 * 1120 + offset, device="cuda", dtype=torch.bfloat16)[offset:].view(9, 1120)
    assert torch.equal(linear(x, packed), linear(x.clone(), packed))


@pytest.mark.parametrize("m", [1, 9, 40, 300, 2100])
def test_a_slice_of_a_packed_weight(m):
    packed = pack(random_weight(256, 1024, "e4m3", 16))
    tiles = (slice(1, 3), slice(4, 12))
    part = PackedFP4(packed.words[tiles], packed.scales[tiles], packed.multiplier[64:192], 128, 512, "e4m3", 16)
    x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
    assert_rounded_product(kernel(x, part), x.double() @ part.unpack().decode().T)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_one_to_four_dimensions(lead):
    packed = pack(random_weight(200, 1120, "e4m3", 16))
    x = torch.randn(*lead, 1120, device="cuda", dtype=torch.bfloat16)
    out = linear(x, packed)
    assert out.shape == (*lead, 200)
    assert torch.equal(out.reshape(-1, 200), linear(x.reshape(-1, 1120), packed))


@pytest.mark.parametrize("few, many", [(1, 8), (9, 16), (17, 32), (33, 64), (65, 128)])
@pytest.mark.parametrize("n, k", [(1000, 4064), (96, 16384)])
def test_tokens_alone_equal_the_tokens_in_a_batch_of_the_same_plan(few, many, n, k):
    packed, x = pack(random_weight(n, k, "e4m3", 16)), torch.randn(many, k, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(linear(x, packed)[:few], linear(x[:few], packed))
    assert torch.equal(linear(x, packed)[-few:], linear(x[-few:], packed))


@pytest.mark.parametrize("kind, group", FORMATS)
def test_one_hot_inputs_read_every_weight_back_exactly(kind, group):
    weight = random_weight(128, 512, kind, group)
    weight = FP4Weight(weight.codes, weight.scales, torch.full((128,), 2.0**-2, device="cuda"), kind, group)
    x, exact = torch.eye(512, device="cuda", dtype=torch.bfloat16), weight.decode()
    assert torch.equal(linear(x, pack(weight)).double().T, exact)


@pytest.mark.parametrize("byte", [0, 1, 126, 127, 128, 252])
def test_e8m0_scales_at_the_edges_are_exact_in_bfloat16(byte):
    codes = torch.arange(16, dtype=torch.uint8, device="cuda").repeat(64, 4)
    codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    scales = torch.full((64, 2), byte, dtype=torch.uint8, device="cuda")
    weight = FP4Weight(codes, scales, torch.ones(64, device="cuda"), "e8m0", 32)
    out = linear(torch.eye(64, device="cuda", dtype=torch.bfloat16), pack(weight))
    assert torch.equal(out.double().T, weight.decode())


def test_float16_never_clips_an_e8m0_scale_in_silence():
    weight = random_weight(64, 64, "e8m0", 32)
    weight.scales[0, 0] = 90
    assert linear(torch.ones(1, 64, device="cuda", dtype=torch.float16), pack(weight))[0, 0].isnan()
    fitted = weight.fit(torch.bfloat16)
    with pytest.raises(ValueError, match="span of at most 36"):
        FP4Weight(weight.codes, weight.scales.index_fill(1, torch.tensor(1, device="cuda"), 140),
                  weight.multiplier, "e8m0", 32).fit(torch.float16)  # fmt: skip
    assert torch.equal(fitted.decode(), weight.decode())


def test_float32_goes_through_blocks():
    weight, x = random_weight(200, 1120, "e4m3", 16), torch.randn(5, 1120, device="cuda")
    exact = x.double() @ weight.decode().T
    assert ((linear(x, pack(weight)).double() - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("factor", [1e-35, 1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("rows", [64, 200])
def test_float32_sums_have_the_range_of_the_dense_weight(rows, factor):
    weight = random_weight(rows, 1120, "e4m3", 16)
    multiplier = factor * torch.randn(rows, device="cuda").index_fill(0, torch.tensor(3, device="cuda"), 0.0)
    weight = FP4Weight(weight.codes, weight.scales, multiplier, "e4m3", 16)
    x = min(1e30 / factor, 3.3e38) * torch.rand(5, 1120, device="cuda")
    exact = x.double() @ weight.decode().T
    assert ((linear(x, pack(weight)).double() - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("dtype, m, bias", list(itertools.product(GATES, (0, 3), (True, False))))
def test_opcheck(dtype, m, bias):
    packed = pack(random_weight(70, 160, "e4m3", 16))
    x = torch.randn(m, 160, device="cuda", dtype=dtype, requires_grad=True)
    b = torch.randn(70, device="cuda", dtype=dtype, requires_grad=True) if bias else None
    torch.library.opcheck(torch.ops.marlin_w4a16.linear.default, (x, *weight_args(packed), b))


def test_gradients_are_those_of_the_dense_weight():
    weight = random_weight(200, 1120, "e4m3", 16)
    dense = weight.decode(torch.float32)
    x = torch.randn(5, 1120, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(200, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 200, device="cuda", dtype=torch.bfloat16)
    linear(x, pack(weight), bias).backward(grad)
    exact = grad.double() @ dense.double()
    assert ((x.grad.double() - exact).norm() / exact.norm()).item() < 1.75e-3
    assert torch.equal(bias.grad, grad.float().sum(0).bfloat16())


def test_autocast_is_that_of_f_linear():
    weight, x = random_weight(200, 1120, "e4m3", 16), torch.randn(5, 1120, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = linear(x, pack(weight))
    assert torch.equal(out, linear(x.bfloat16(), pack(weight)))


def test_tensors_of_two_devices_are_an_error_that_names_both():
    packed = pack(random_weight(64, 64, "e4m3", 16))
    with pytest.raises(ValueError, match=r"words: found device cuda:0, expected that of the input, cpu"):
        linear(torch.randn(1, 64, dtype=torch.bfloat16), packed)


def test_offsets_beyond_two_to_the_31():
    n, k = 1 << 17, 64
    packed, x = pack(random_weight(n, k, "e4m3", 16)), torch.randn(17000, k, device="cuda", dtype=torch.bfloat16)
    out = linear(x, packed)
    assert out.numel() > 1 << 31
    assert torch.equal(out[-16:], linear(x[-16:].repeat(200, 1), packed)[:16])
    wide = Launch(64, 128, 64, 2, 4, 3)
    assert torch.equal(kernel(x[:9000], packed, None, wide)[-1], kernel(x[8999:9000], packed, None, wide)[0])


@on_hopper
def test_offsets_beyond_two_to_the_31_on_hopper():
    packed = pack(random_weight(1 << 17, 64, "e4m3", 16))
    x = torch.randn(17000, 64, device="cuda", dtype=torch.bfloat16)
    launch = Stream(256, 128, 4, 2, 16, False, 132)
    out = kernel(x, packed, None, launch)
    assert out.numel() > 1 << 31
    assert torch.equal(out[-16:], kernel(x[-16:], packed, None, launch))
