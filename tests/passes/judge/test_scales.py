"""Block scales held as floats: every byte comes back, and a folded factor gives every scale again, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlin_w4a16.passes.judge.scales import to_e4m3, to_e8m0

E4M3 = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
E8M0 = torch.arange(255, dtype=torch.uint8)
FLOATS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
SEEDS = st.integers(0, 2**31)
FACTORS = st.floats(2.0**-60, 2.0**60, width=32)
RUN = settings(deadline=None, derandomize=True, max_examples=60)


def e4m3(scales: Tensor) -> Tensor:
    return scales.view(torch.float8_e4m3fn).float()


def power(scales: Tensor) -> Tensor:
    return torch.exp2(scales.double() - 127)


def some(count: int, columns: int, seed: int, top: int = 0x7F) -> Tensor:
    """Random bytes of positive E4M3 scales."""
    return torch.randint(1, top, (count, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_gives(scales: Tensor, found: tuple[Tensor, Tensor | None]) -> Tensor:
    """Byte times factor, rounded once to the dtype of the scales, is every scale."""
    byte, factor = found
    assert (byte.dtype, byte.shape) == (torch.uint8, scales.shape)
    assert (factor.dtype, factor.shape, factor.is_contiguous()) == (torch.float32, scales.shape[:1], True)
    product = e4m3(byte).double() * factor.double()[:, None]
    assert torch.equal(product.to(scales.dtype), scales)
    return factor


@FLOATS
def test_every_byte_of_e4m3_comes_back(dtype):
    byte, factor = to_e4m3(e4m3(E4M3).to(dtype).view(2, -1))
    assert torch.equal(byte, E4M3.view(2, -1)) and factor is None


@FLOATS
def test_every_byte_of_e8m0_comes_back(dtype):
    held = E8M0[103:143] if dtype == torch.float16 else E8M0  # float16 holds 2**-24 to 2**15
    byte, factor = to_e8m0(power(held).to(dtype).view(5, -1))
    assert torch.equal(byte, held.view(5, -1)) and byte.dtype == torch.uint8 and factor is None


@RUN
@given(FACTORS, SEEDS, st.integers(1, 9))
def test_a_float32_factor_of_all_rows(factor, seed, columns):
    scales = e4m3(some(5, columns, seed)) * factor
    found = to_e4m3(scales)
    if found[1] is None:  # the factor was a power of two or so
        assert torch.equal(e4m3(found[0]), scales)
    else:
        assert assert_gives(scales, found).unique().numel() == 1


@RUN
@given(SEEDS, st.integers(1, 9))
def test_a_float32_factor_of_each_row(seed, columns):
    bytes_ = some(5, columns, seed)
    factors = torch.rand(5, 1, generator=torch.Generator().manual_seed(seed)) + 0.01
    scales = e4m3(bytes_) * factors
    assert_gives(scales, to_e4m3(scales))


@RUN
@given(SEEDS)
def test_a_factor_of_few_bits_in_bfloat16(seed):
    scales = e4m3(some(5, 16, seed, 0x60)).bfloat16() * 1.375 * 2.0**-20
    assert_gives(scales, to_e4m3(scales))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_sixteen_bits_rounded_is_refused(dtype):
    scales = (e4m3(some(5, 64, 0)) * 0.00137).to(dtype)
    with pytest.raises(ValueError, match="not E4M3 values times one factor a row"):
        to_e4m3(scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_sixteen_bits_rounded_is_refused_though_the_largest_scale_is_exact(dtype):
    scales = (torch.tensor([[256.0, 1.125]]) * (1 + torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(ValueError, match="not E4M3 values times one factor a row"):
        to_e4m3(scales)


def test_the_factor_is_a_float32_one_for_float64_scales():
    scales = e4m3(some(5, 64, 0)).double() * float(torch.tensor(0.00137))
    assert_gives(scales, to_e4m3(scales))


def test_one_factor_of_all_rows_is_sought_first():
    """A row of one value alone has many."""
    scales = e4m3(torch.tensor([[0x38, 0x39, 0x3A], [0x3B, 0x3B, 0x3B]], dtype=torch.uint8)) * 0.3
    assert assert_gives(scales, to_e4m3(scales)).unique().numel() == 1


def test_the_significand_of_the_largest_scale_may_be_any():
    for top in range(0x78, 0x7F):
        scales = e4m3(torch.tensor([[top, 0x70 + (top & 7), 0x31, 0x32, 0x33]], dtype=torch.uint8)) * 0.7123
        assert_gives(scales, to_e4m3(scales))


def test_zeros_among_scales():
    byte = some(4, 8, 0)
    byte[1], byte[2, 3] = 0, 0
    scales = e4m3(byte) * torch.tensor([0.3, 0.4, 0.5, 0.6])[:, None]
    assert assert_gives(scales, to_e4m3(scales))[1] == 1


def test_scales_of_zeros_are_bytes_of_zeros():
    byte, factor = to_e4m3(torch.zeros(3, 4))
    assert not byte.any() and factor is None


def test_a_scale_beside_the_others_is_refused():
    scales = e4m3(some(5, 64, 0)) * 0.37
    scales[3, 7] *= 1 + 2.0**-12
    with pytest.raises(ValueError, match="not E4M3 values times one factor a row"):
        to_e4m3(scales)


@pytest.mark.parametrize("value", [-0.3, torch.inf, torch.nan])
def test_a_factor_of_scales_that_are_negative_or_not_finite_is_refused(value):
    scales = e4m3(some(5, 8, 0)) * 0.37
    scales[3, 7] = value
    with pytest.raises(ValueError, match="negative or not finite"):
        to_e4m3(scales)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_bytes_that_are_not_finite_are_refused(value):
    scales = e4m3(some(5, 8, 0))
    scales[3, 7] = value
    with pytest.raises(ValueError, match="negative or not finite"):
        to_e4m3(scales)


def test_negative_bytes_are_bytes():
    byte = some(5, 8, 0) | 0x80
    found, factor = to_e4m3(e4m3(byte))
    assert torch.equal(found, byte) and factor is None


def test_scales_that_need_more_than_the_range_of_e4m3_are_refused():
    with pytest.raises(ValueError, match="not E4M3 values times one factor a row"):
        to_e4m3(torch.tensor([[2.0**-10 * 0.3, 448 * 0.3]]))


@RUN
@given(SEEDS, st.booleans())
def test_powers_of_two_times_a_factor(seed, each_row):
    generator = torch.Generator().manual_seed(seed)
    byte = torch.randint(1, 253, (5, 7), dtype=torch.uint8, generator=generator)
    factors = 1 + torch.rand(5 if each_row else 1, 1, generator=generator)
    scales = (power(byte) * factors).float()
    if bool((factors == 1).all()):
        return
    found, factor = to_e8m0(scales)
    assert torch.equal(found, byte) and (factor.dtype, factor.shape) == (torch.float32, (5,))
    assert torch.equal(factor, factors[:, 0].expand(5))


def test_a_factor_of_some_rows_alone():
    byte, factor = to_e8m0(torch.tensor([[1.0, 2.0], [3.0, 0.75]]))
    assert byte.tolist() == [[127, 128], [128, 126]] and factor.tolist() == [1.0, 1.5]


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 0.0], [0.0, 0.0], [1.0, -1.0], [-1.0, -1.0], [1.0, 3.0], [1.0, torch.inf], [1.0, torch.nan],
        [torch.inf, torch.inf], [torch.nan, torch.nan], [1.0, 2.0**-128], [1.0, 2.0**128], [1.0, 1 + 2.0**-23],
        [1.0, 1 + 2.0**-40],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_power_of_two_times_a_factor_is_refused(row):
    with pytest.raises(ValueError, match="not powers of two times one factor a row"):
        to_e8m0(torch.tensor([[1.0, 2.0], row], dtype=torch.float64))
