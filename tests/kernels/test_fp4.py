"""The oracle itself, against the formats' definitions in exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_w4a16.kernels.fp4 import FP4Weight

FINITE_BYTES = {"e4m3": [b for b in range(256) if b & 0x7F != 0x7F], "e8m0": list(range(255))}
# significand bits, least and greatest exponent
FORMATS = {torch.float16: (11, -14, 15), torch.bfloat16: (8, -126, 127), torch.float32: (24, -126, 127)}


def e2m1(code: int) -> Fraction:
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = Fraction(2 + mantissa, 2) * 2 ** (exponent - 1) if exponent else Fraction(mantissa, 2)
    return -magnitude if code & 8 else magnitude


def scale(kind: str, byte: int) -> Fraction:
    if kind == "e8m0":
        return Fraction(2) ** (byte - 127)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    magnitude = Fraction(8 + mantissa) * Fraction(2) ** (exponent - 10) if exponent else Fraction(mantissa, 512)
    return -magnitude if byte & 0x80 else magnitude


def rounded(value: Fraction, dtype: torch.dtype) -> float:
    """``value`` to nearest, ties to even, exactly."""
    precision, low, high = FORMATS[dtype]
    if value == 0:
        return 0.0
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    quantum = Fraction(2) ** (max(exponent, low) - precision + 1)
    nearest = round(value / quantum) * quantum
    return math.copysign(math.inf, value) if abs(nearest) >= Fraction(2) ** (high + 1) else float(nearest)


def exact_values(weight: FP4Weight) -> list[list[Fraction]]:
    """A 2-D weight, element by element."""
    rows = []
    for codes, scales, multiplier in zip(
        weight.codes.tolist(), weight.scales.tolist(), weight.multiplier.tolist(), strict=True
    ):
        nibbles = [nibble for byte in codes for nibble in (byte & 15, byte >> 4)]
        factors = [scale(weight.kind, byte) * Fraction(multiplier) for byte in scales]
        rows.append([e2m1(code) * factors[column // weight.group] for column, code in enumerate(nibbles)])
    return rows


def all_products(kind: str, group: int) -> FP4Weight:
    """Every code in every row, a row for every finite scale byte."""
    scales = torch.tensor(FINITE_BYTES[kind], dtype=torch.uint8).unsqueeze(1)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * (group // 16), dtype=torch.uint8)
    return FP4Weight(codes.expand(len(scales), -1), scales, torch.ones(len(scales)), kind, group)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


@st.composite
def weights(draw) -> FP4Weight:
    kind, group = draw(st.sampled_from(["e4m3", "e8m0"])), draw(st.sampled_from([16, 32]))
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    codes = draw(
        st.lists(st.binary(min_size=groups * group // 2, max_size=groups * group // 2), min_size=n, max_size=n)
    )
    scales = draw(st.lists(st.sampled_from(FINITE_BYTES[kind]), min_size=n * groups, max_size=n * groups))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    multiplier = draw(st.lists(finite | st.floats(-4, 4, width=32), min_size=n, max_size=n))
    return FP4Weight(
        torch.tensor([list(row) for row in codes], dtype=torch.uint8),
        torch.tensor(scales, dtype=torch.uint8).reshape(n, groups), torch.tensor(multiplier), kind, group,
    )  # fmt: skip


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_every_code_times_every_finite_scale_is_exact(kind, group):
    weight = all_products(kind, group)
    decoded = weight.decode()
    assert decoded.tolist() == exact_values(weight)
    negative = (torch.arange(group) % 16 >= 8) ^ (weight.scales >= 128 if kind == "e4m3" else torch.tensor(False))
    assert torch.equal(decoded.signbit(), negative.expand_as(decoded))


@given(weights())
def test_an_element_is_its_code_times_its_groups_scale_times_its_rows_multiplier(weight):
    assert weight.decode().tolist() == exact_values(weight)


@given(weights())
def test_unscaled_leaves_the_multiplier_out(weight):
    ones = FP4Weight(weight.codes, weight.scales, torch.ones_like(weight.multiplier), weight.kind, weight.group)
    assert torch.equal(bits(weight.unscaled(torch.float64)), bits(ones.decode()))


@given(weights(), st.sampled_from(list(FORMATS)))
@settings(max_examples=300)
def test_decode_rounds_the_exact_value_to_nearest_even(weight, dtype):
    expected = [[rounded(value, dtype) for value in row] for row in exact_values(weight)]
    assert weight.decode(dtype).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_rounds_once_next_to_ties(dtype):
    """Multipliers that bring code times scale as near as float32 can to a tie of ``dtype``, up to the overflow's."""
    precision, *_, high = FORMATS[dtype]
    significands = torch.arange(2**precision - 16, 2**precision) + 0.5
    ties = significands.double() * 2.0 ** torch.tensor([[0.0], [high]]) * 2.0 ** (1 - precision)
    scales = torch.arange(0x38, 0x40, dtype=torch.uint8)
    nearest = (ties.reshape(-1, 1) / (6 * scales.view(torch.float8_e4m3fn).double())).float()
    multiplier = (bits(nearest).unsqueeze(-1) + torch.arange(-1, 2, dtype=torch.int32)).view(torch.float32)
    codes = torch.full((multiplier.numel(), 8), 0xF7, dtype=torch.uint8)
    rows = scales.view(1, 8, 1).expand_as(multiplier).reshape(-1, 1)
    weight = FP4Weight(codes, rows, multiplier.flatten(), "e4m3", 16)
    expected = torch.tensor([[rounded(v, dtype) for v in row] for row in exact_values(weight)], dtype=dtype)
    assert torch.equal(weight.decode(dtype), expected)
    assert not torch.equal(weight.decode().float().to(dtype), expected), "rounding twice would pass"


def test_leading_dimensions_decode_like_their_matrices():
    codes, scales = torch.randint(256, (2, 3, 5, 32)), torch.randint(255, (2, 3, 5, 2))
    weight = FP4Weight(codes.byte(), scales.byte(), torch.randn(2, 3, 5), "e8m0", 32)
    for i in range(2):
        for j in range(3):
            part = FP4Weight(weight.codes[i, j], weight.scales[i, j], weight.multiplier[i, j], "e8m0", 32)
            assert torch.equal(weight.decode()[i, j], part.decode())


@given(n=st.integers(0, 9), elements=st.integers(0, 300))
def test_row_blocks_walk_every_row_once_as_views(n, elements):
    weight = FP4Weight(
        torch.randint(256, (n, 16)).byte(), torch.randint(255, (n, 2)).byte(), torch.randn(n), "e8m0", 16, "w"
    )
    blocks = list(weight.row_blocks(elements))
    assert [row for rows, _ in blocks for row in range(n)[rows]] == list(range(n))
    for rows, part in blocks:
        assert (part.kind, part.group, part.name) == ("e8m0", 16, "w") and part.n <= max(1, elements // 32)
        for tensor in ("codes", "scales", "multiplier"):
            view, whole = getattr(part, tensor), getattr(weight, tensor)
            assert torch.equal(view, whole[rows])
            assert view.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
