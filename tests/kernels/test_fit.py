"""Moving powers of two from E8M0 scales into the multiplier: the values stay, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin_w4a16.kernels.fp4 import FP4Weight

ONE = 127
# bytes whose power of two times every code is exact in the dtype
BYTES = {torch.float16: (104, 140), torch.bfloat16: (0, 252), torch.float32: (0, 252)}
DTYPES = list(BYTES)
ZEROS = (0x00, 0x08, 0x80, 0x88)


def make(scales: list[list[int]], multiplier: float = 1.0, zero_groups: tuple[tuple[int, int], ...] = ()) -> FP4Weight:
    """Groups of 16 whose codes are all in use, but for the groups of zeros."""
    n, groups = len(scales), len(scales[0])
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(n, groups)
    for row, group in zero_groups:
        codes[row, 8 * group : 8 * group + 8] = torch.tensor(ZEROS * 2, dtype=torch.uint8)
    scales = torch.tensor(scales, dtype=torch.uint8)
    return FP4Weight(codes, scales, torch.full((n,), multiplier), "e8m0", 16, "layers.3.up")


def same_bits(a: FP4Weight, b: FP4Weight) -> bool:
    return torch.equal(a.decode().view(torch.int64), b.decode().view(torch.int64))


def is_exact_in(weight: FP4Weight, dtype: torch.dtype) -> bool:
    return torch.equal(weight.unscaled(dtype).double(), weight.unscaled(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_in_range_is_returned_as_it_is(dtype):
    low, high = BYTES[dtype]
    weight = make([[low, high], [high, low], [ONE, ONE]], multiplier=0.7)
    assert is_exact_in(weight, dtype) and weight.fit(dtype) is weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_byte_further_is_not_in_range(dtype):
    low, high = BYTES[dtype]
    for byte in {max(low - 1, 0), high + 1} - {0}:
        weight = make([[byte]])
        assert not is_exact_in(weight, dtype) and weight.fit(dtype) is not weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_fits_every_dtype(dtype, random_weight):
    weight = random_weight(8, 64)
    weight.scales.copy_(torch.arange(32).reshape(8, 4) * 4)
    assert is_exact_in(weight, dtype) and weight.fit(dtype) is weight


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(
        st.integers(0, 218).flatmap(lambda low: st.lists(st.integers(low, low + 36), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    zeros=st.sets(st.tuples(st.just(0), st.integers(0, 2))),
    multiplier=st.sampled_from([1.0, -3.1415927, 0.0, 2.0**-20]),
)
def test_a_fitted_weight_has_the_same_values_and_is_exact(dtype, rows, zeros, multiplier):
    weight = make(rows, multiplier, tuple(zeros))
    fitted = weight.fit(dtype)
    assert same_bits(weight, fitted) and is_exact_in(fitted, dtype)
    assert torch.equal(fitted.codes, weight.codes)
    assert (fitted.kind, fitted.group, fitted.name) == ("e8m0", 16, "layers.3.up")


@pytest.mark.parametrize("byte", range(255))
def test_every_single_scale_fits_float16(byte):
    weight = make([[byte]])
    fitted = weight.fit(torch.float16)
    assert same_bits(weight, fitted) and is_exact_in(fitted, torch.float16)


@pytest.mark.parametrize("byte, power", [(103, -1), (141, 1), (0, -104), (254, 114)])
def test_a_row_moves_no_further_than_it_must(byte, power):
    assert make([[byte]]).fit(torch.float16).multiplier.tolist() == [2.0**power]


def test_only_the_rows_that_need_it_are_moved():
    weight = make([[ONE, ONE - 20], [200, 190], [3, 9]], multiplier=1.5)
    fitted = weight.fit(torch.float16)
    assert fitted.scales[0].tolist() == [ONE, ONE - 20] and fitted.multiplier[0] == 1.5
    assert (fitted.multiplier[1:] != 1.5).all() and same_bits(weight, fitted)


@pytest.mark.parametrize("scales", [[254, 0, ONE], [ONE, 254, 0], [0, ONE, 254]])
def test_the_scales_of_zeros_are_free(scales):
    weight = make([scales], 0.7, tuple((0, group) for group, byte in enumerate(scales) if byte != ONE))
    fitted = weight.fit(torch.float16)
    assert fitted.multiplier.tolist() == weight.multiplier.tolist()
    assert same_bits(weight, fitted) and is_exact_in(fitted, torch.float16)


def test_a_row_of_zeros_fits():
    weight = make([[0, 254], [ONE, ONE]], 0.7, ((0, 0), (0, 1)))
    fitted = weight.fit(torch.float16)
    assert fitted.multiplier.tolist() == weight.multiplier.tolist() and same_bits(weight, fitted)


@pytest.mark.parametrize("dtype, span", [(torch.float16, 36), (torch.bfloat16, 252), (torch.float32, 252)])
def test_a_row_of_too_many_binades_is_refused_by_name(dtype, span):
    make([[ONE, ONE], [1, 1 + span]]).fit(dtype)
    with pytest.raises(ValueError) as error:
        make([[ONE, ONE], [1, 2 + span], [ONE, ONE]]).fit(dtype)
    found = f"row 1 holds powers of two from -126 to {span - 125}"
    assert str(error.value) == f"layers.3.up: scales: {found}, expected a span of at most {span} for {dtype}"


@pytest.mark.parametrize("byte, multiplier", [(254, 2.0**100), (0, 2.0**-46), (0, 2.0**-23 + 2.0**-46)])
def test_a_multiplier_that_cannot_take_the_power_of_two_is_refused(byte, multiplier):
    with pytest.raises(ValueError, match=r"^layers\.3\.up: multiplier"):
        make([[byte]], multiplier).fit(torch.float16)


@pytest.mark.parametrize("lead", [(3,), (2, 3), (7, 1)])
def test_the_matrices_of_a_stack_are_fitted_row_by_row(lead):
    parts = [make([[ONE - 30, ONE - 20], [ONE, ONE + 13], [ONE + 20 + i, ONE + 30]]) for i in range(21 // len(lead))]
    parts = parts[: int(torch.tensor(lead).prod())]

    def stack(weights: list[FP4Weight]) -> FP4Weight:
        tensors = [torch.stack([getattr(w, f) for w in weights]) for f in ("codes", "scales", "multiplier")]
        return FP4Weight(*(t.unflatten(0, lead) for t in tensors), "e8m0", 16, "experts")

    weight = stack(parts)
    fitted, expected = weight.fit(torch.float16), stack([part.fit(torch.float16) for part in parts])
    assert is_exact_in(fitted, torch.float16) and same_bits(fitted, weight)
    for field in ("codes", "scales", "multiplier"):
        assert torch.equal(getattr(fitted, field), getattr(expected, field)), field
    assert fitted.fit(torch.float16) is fitted


def test_a_row_of_a_stack_that_does_not_fit_is_counted_on():
    good, bad = make([[ONE], [ONE]]), make([[ONE], [ONE]])
    codes, scales = torch.stack((good.codes, bad.codes)).repeat(1, 1, 2), torch.stack((good.scales, bad.scales))
    scales = torch.cat((scales, scales + 60 * torch.tensor([[[0], [0]], [[0], [1]]], dtype=torch.uint8)), -1)
    weight = FP4Weight(codes, scales, torch.ones(2, 2), "e8m0", 16, "experts")
    with pytest.raises(ValueError, match="experts: scales: row 3 holds powers of two from 0 to 60"):
        weight.fit(torch.float16)
