"""Every byte of a scale, to a float and back; what is no scale; FP8 codes that are looked for in values."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import round_once
from marlin_w4a16.kernels.scale_bytes import (
    E4M3_MAX,
    E4M3_TINY,
    SCALE_DTYPES,
    SCALE_KINDS,
    e8m0_exponents,
    e8m0_of,
    e8m0_values,
    first_nan,
    fp8_codes,
    scale_bytes,
    scale_table,
    scale_values,
)

BYTES = torch.arange(256).to(torch.uint8)
NAN = {"e4m3": (0x7F, 0xFF), "e8m0": (0xFF,)}
FINITE = {kind: [b for b in range(256) if b not in NAN[kind]] for kind in SCALE_KINDS}
EVERY_KIND = pytest.mark.parametrize("kind", SCALE_KINDS)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def by_the_book(byte: int, kind: str) -> Fraction:
    """Sign, exponent and significand of a byte, as the formats define them."""
    if kind == "e8m0":
        return Fraction(2) ** (byte - 127)
    exponent, significand = byte >> 3 & 15, byte & 7
    size = Fraction(8 + significand, 8) * Fraction(2) ** (exponent - 7) if exponent else Fraction(significand, 512)
    return -size if byte >> 7 else size


def finite(kind: str) -> Tensor:
    return BYTES[FINITE[kind]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int64 if tensor.dtype == torch.float64 else torch.int32)


@EVERY_KIND
def test_every_byte_is_the_number_of_the_format(kind):
    table = scale_table(kind, torch.device("cpu"), torch.float64)
    assert [Fraction(v) for v in table[FINITE[kind]].tolist()] == [by_the_book(b, kind) for b in FINITE[kind]]
    assert table.isnan().nonzero().flatten().tolist() == list(NAN[kind])
    typed = next(dtype for dtype, of in SCALE_DTYPES.items() if of == kind)
    assert torch.equal(BYTES.view(typed).double().nan_to_num(0.3), table.nan_to_num(0.3))  # as torch reads them


@EVERY_KIND
def test_tables_and_values_agree_bit_for_bit(kind):
    byte = finite(kind)
    table = scale_table(kind, torch.device("cpu"), torch.float64)[byte.int()]
    values = scale_values(byte, kind)
    assert values.dtype == torch.float32 and torch.equal(bits(values.double()), bits(table))
    if kind == "e8m0":
        assert torch.equal(bits(e8m0_values(byte)), bits(table)) and e8m0_values(BYTES[255:]).isnan().all()


@EVERY_KIND
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_byte_comes_back_from_every_dtype_that_holds_it(kind, dtype):
    exact = scale_table(kind, torch.device("cpu"), torch.float64)[finite(kind).int()]
    held = exact.to(dtype).double() == exact
    assert bool(held.all()) or (kind, dtype, int(held.sum())) == ("e8m0", torch.float16, 40)  # 2**-24 to 2**15
    found = scale_bytes(exact.to(dtype), kind)
    assert found.dtype == torch.uint8 and torch.equal(found[held], finite(kind)[held])
    assert _all_nan(found[~held], kind)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_neighbours_and_what_is_no_number_are_refused(kind, dtype):
    exact = scale_table(kind, torch.device("cpu"), torch.float64)[finite(kind).int()].to(dtype)
    exact = exact[(exact != 0) & (exact.abs() >= torch.finfo(dtype).tiny)]
    for towards in (torch.inf, -torch.inf):
        assert _all_nan(scale_bytes(torch.nextafter(exact, torch.full_like(exact, towards)), kind), kind)
    odd = [torch.inf, -torch.inf, torch.nan, 3.0 * 2**-12, *((0.0, -1.0, 3.0) if kind == "e8m0" else ())]
    beyond = [2.0**-128, 2.0**-149] if kind == "e8m0" else [-464.0, 464.0, 449.0, 480.0, 2.0**-10]
    assert _all_nan(scale_bytes(torch.tensor([*odd, *beyond], dtype=dtype), kind), kind)
    assert _all_nan(scale_bytes(torch.tensor([2.0**128, 2.0**1000], dtype=torch.float64), kind), kind)


def _all_nan(byte: Tensor, kind: str) -> bool:
    return byte.tolist() == [NAN[kind][0]] * len(byte)


@EVERY_KIND
def test_the_first_nan_is_found(kind):
    assert first_nan(finite(kind).view(2, -1) if kind == "e4m3" else finite(kind).view(5, -1), kind) is None
    for byte in NAN[kind]:
        scales = torch.zeros((3, 4), dtype=torch.uint8)
        scales[1, 2] = scales[2, 0] = byte
        assert first_nan(scales, kind) == [1, 2]
    assert first_nan(torch.empty((0, 4), dtype=torch.uint8), kind) is None


def test_powers_of_two_are_exponents_and_back():
    byte = finite("e8m0")
    assert e8m0_exponents(byte).tolist() == list(range(-127, 128))
    assert torch.equal(e8m0_of(e8m0_exponents(byte)), byte)
    assert torch.equal(e8m0_of(e8m0_exponents(byte).double()), byte)
    assert e8m0_of(torch.tensor([-1000, -128, 128, 1000])).tolist() == [0, 0, 254, 254]
    assert e8m0_of(torch.tensor([-torch.inf, 127.0])).tolist() == [0, 254]


def test_the_ends_of_e4m3():
    sizes = scale_table("e4m3", torch.device("cpu"), torch.float64)[:0x7F]
    assert (float(sizes[1]), float(sizes.amax())) == (E4M3_TINY, E4M3_MAX)


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("rounded", [round_once, Tensor.to], ids=["once", "as torch"])
def test_fp8_codes_come_back_bit_for_bit(rounded, dtype):
    codes, scale = BYTES.view(torch.float8_e4m3fn).view(2, 128), torch.tensor([[0.0123], [7.0]]).double()
    found = fp8_codes(rounded(codes.double() * scale, dtype), scale, rounded)
    nan = codes.float().isnan()
    assert found is not None and torch.equal(found.float().isnan(), nan)  # the sign of NaN may be lost
    assert torch.equal(found.view(torch.uint8)[~nan], codes.view(torch.uint8)[~nan])


def test_values_that_are_no_fp8_codes_are_refused():
    one = torch.ones((), dtype=torch.float64)
    assert fp8_codes(torch.tensor([1.0, -448.0, 2.0**-9, 0.0]), one, round_once) is not None
    for bad in (1.0625, 449.0, 2.0**-10, torch.inf, -torch.inf):
        assert fp8_codes(torch.tensor([1.0, bad]), one, round_once) is None
