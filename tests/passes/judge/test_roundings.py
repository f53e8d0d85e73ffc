"""The forms of rounding, against operations that torch runs in 16 bits, and how far a weight is from its decode."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import FP4Weight, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.judge.roundings import (
    EXACT,
    Difference,
    Roundings,
    first_difference,
    largest_error,
    roundings_of,
)

N, K = 24, 256
ROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# As a model computes it: codes, scales and factor in float32, a cast to 16 bits, the factor times or divided by.
TRACED = {
    "weight": lambda c, s, m, to, by: to(by(c * s, m)).float(),
    "scale": lambda c, s, m, to, by: c * to(by(s, m)),
    "scale, weight": lambda c, s, m, to, by: to(c) * to(by(s, m)),
    "factor, weight": lambda c, s, m, to, by: by(to(c) * to(s), to(m)),
    "factor, scale, weight": lambda c, s, m, to, by: to(c) * by(to(s), to(m)),
    "code, weight": lambda c, s, m, to, by: to(by(c, m)) * to(s),
    "factor, code, weight": lambda c, s, m, to, by: by(to(c), to(m)) * to(s),
    "factor, reciprocal, weight": lambda c, s, m, to, by: to(c) * to(s) * to(m).reciprocal(),
    "factor, reciprocal, scale, weight": lambda c, s, m, to, by: to(c) * (to(s) * to(m).reciprocal()),
}
FLOAT32 = ("weight", "scale")  # what comes out is not rounded again
CASES = [(name, divides) for name in TRACED for divides in (False, True) if divides or "reciprocal" not in name]
EACH = pytest.mark.parametrize("name, divides", CASES, ids=[f"{n}{' /' * d}" for n, d in CASES])


def weight_of(divides: bool, per_row: bool = True) -> tuple[FP4Weight, Tensor]:
    """A weight and its model's own factor; zeros, subnormal scales and the largest code among its elements."""
    weight = quantize_nvfp4(torch.randn(N, K))
    weight.scales[:, 0] = torch.arange(1, N + 1, dtype=torch.uint8)
    weight.codes[0, :4] = torch.tensor([0x00, 0x80, 0x77, 0xF8], dtype=torch.uint8)
    factor = (torch.rand(N) + 0.5) * (370.0 if divides else 0.0027)
    factor = factor if per_row else factor[:1].expand(N).contiguous()
    return replace(weight, multiplier=factor.reciprocal() if divides else factor), factor


def traced(name: str, divides: bool, dtype: torch.dtype, weight: FP4Weight, factor: Tensor) -> Tensor:
    codes, scales = weight.factors(torch.float32)
    by = torch.div if divides else torch.mul
    value = TRACED[name](codes, scales.unsqueeze(-1), factor[:, None, None], lambda t: t.to(dtype), by)
    assert value.dtype == (torch.float32 if name in FLOAT32 else dtype)
    return value.flatten(1)


@ROW
@EACH
def test_a_form_is_what_torch_computes(name, divides, dtype):
    weight, factor = weight_of(divides)
    value, form = traced(name, divides, dtype, weight, factor), Roundings(name, dtype, divides)
    predicted = form.predict(weight, factor)
    assert predicted.dtype == torch.float32 and torch.equal(predicted.to(value.dtype), value)
    assert first_difference(form, weight, factor, value) is None


@ROW
@EACH
def test_a_form_is_not_the_exact_one_but_near_it(name, divides, dtype):
    weight, factor = weight_of(divides)
    value = traced(name, divides, dtype, weight, factor)
    assert first_difference(Roundings(), weight, factor, value) is not None
    rounded = {"once": 1, "twice": 2, "three times": 3, "four times": 4}
    times = next(count for word, count in rounded.items() if f"rounded {word} " in str(Roundings(name, dtype, divides)))
    assert times == len(name.split(", ")) and name in str(Roundings(name, dtype, divides))
    normal = weight.decode().abs() >= torch.finfo(torch.float16).smallest_normal * 16
    error = ((value.double() - weight.decode()) / weight.decode()).abs()[normal]
    assert 1e-5 < error.max() <= times * torch.finfo(dtype).eps / 2 * 1.01


@ROW
@EACH
def test_a_form_tells_itself_from_all_others(name, divides, dtype):
    """Each gives other bits than the rest, so the note of a report is right."""
    weight, factor = weight_of(divides)
    value = traced(name, divides, dtype, weight, factor)
    right = [
        form
        for form in roundings_of(value.dtype, {torch.bfloat16, torch.float16}, divides)
        if first_difference(form, weight, factor, value) is None
    ]
    assert right == [Roundings(name, dtype, divides)]


@ROW
@pytest.mark.parametrize("name", ["scale", "factor, scale, weight"])
def test_one_bit_beside_it_is_a_difference(name, dtype):
    weight, factor = weight_of(False)
    value = traced(name, False, dtype, weight, factor)
    expected = float(value[N - 2, K - 3])
    value[N - 2, K - 3] = torch.nextafter(value[N - 2, K - 3], value.new_tensor(torch.inf))
    value[N - 1, 0] = 7.0
    found = first_difference(Roundings(name, dtype), weight, factor, value)
    assert found == Difference(N - 2, K - 3, expected, float(value[N - 2, K - 3])) and found.found != expected


@pytest.mark.parametrize(
    "ulps, same", [(-3, False), (-2, True), (-1, True), (0, True), (1, True), (2, True), (3, False)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_float32_may_be_two_units_in_the_last_place_off(ulps, same, sign):
    weight, factor = weight_of(False)
    codes, scales = weight.factors(torch.float32)
    value = ((codes * scales.unsqueeze(-1)) * factor[:, None, None]).flatten(1)
    row, column = (value.sign() == sign).nonzero()[-1].tolist()
    exact, towards = float(value[row, column]), value.new_tensor(torch.inf * sign * (1 if ulps > 0 else -1))
    for _ in range(abs(ulps)):
        value[row, column] = torch.nextafter(value[row, column], towards)
    found = first_difference(Roundings(), weight, factor, value)
    assert found == (None if same else Difference(row, column, exact, float(value[row, column])))


@pytest.mark.parametrize("ulps, same", [(-2, True), (-1, True), (1, True), (2, True), (3, False)])
def test_two_units_of_a_negative_power_of_two_are_those_above_it(ulps, same):
    weight = quantize_mxfp4(torch.randn(4, 32))
    weight.codes[2, 3] = 0xCC  # -2, -2
    value = weight.decode(torch.float32)
    for _ in range(abs(ulps)):
        value[2, 7] = torch.nextafter(value[2, 7], value.new_tensor(-torch.inf if ulps > 0 else torch.inf))
    assert (first_difference(Roundings(), weight, weight.multiplier, value) is None) == same


def test_the_exact_one_takes_the_multiplier_of_the_weight():
    weight, factor = weight_of(True)
    assert first_difference(Roundings(), weight, factor, weight.decode(torch.float32)) is None


@ROW
def test_sixteen_bits_are_the_rounding_of_what_float32_may_be(dtype):
    weight, factor = weight_of(False)
    value = weight.decode(torch.float32).to(dtype)
    assert first_difference(Roundings(), weight, factor, value) is None
    value[3, 5] = torch.nextafter(value[3, 5], value.new_tensor(torch.inf))
    found = first_difference(Roundings(), weight, factor, value)
    assert (found.row, found.column, found.found) == (3, 5, float(value[3, 5]))


@pytest.mark.parametrize("form", [Roundings(), Roundings("factor, weight", torch.bfloat16)], ids=str)
def test_nan_is_a_difference_and_the_sign_of_zero_is_none(form):
    weight, factor = weight_of(False)
    value = form.predict(weight, factor).bfloat16()
    value[0, 0] = -0.0  # its code is zero
    assert first_difference(form, weight, factor, value) is None
    value[5, 9] = torch.nan
    assert (
        first_difference(form, weight, factor, value).row,
        first_difference(form, weight, factor, value).column,
    ) == (5, 9)


def test_what_follows_a_block_of_rows_is_named_by_its_own_row():
    """2**18 columns: four rows are a block."""
    weight = quantize_mxfp4(torch.randn(10, 1 << 18))
    value = weight.decode(torch.float32)
    value[9, 3] = 99.0
    form, factor = Roundings("factor, weight", torch.bfloat16), torch.linspace(0.5, 1.5, 10)
    each_row = torch.cat([form.predict(part, factor[rows]) for rows, part in weight.row_blocks()])
    assert first_difference(form, weight, factor, each_row) is None
    assert torch.equal(each_row[8], form.predict(next(weight.row_blocks(1 << 22))[1], factor)[8])
    at = first_difference(Roundings(), weight, weight.multiplier, value)
    assert (at.row, at.column, at.found) == (9, 3, 99.0)
    near = weight.decode()
    near[6, 5], near[2, 1] = near[6, 5] * 1.25, near[2, 1] * 1.125
    assert largest_error(weight, near) == 0.25


def test_the_factor_of_each_row_is_its_own():
    weight, factor = weight_of(False)
    value = traced("factor, weight", False, torch.bfloat16, weight, factor)
    assert first_difference(Roundings("factor, weight", torch.bfloat16), weight, factor.roll(1), value) is not None


def test_the_forms_that_may_be():
    def names(traced: torch.dtype, computed_in: set, divides: bool) -> list:
        return [(form.rounds, form.dtype) for form in roundings_of(traced, computed_in, divides)]

    assert names(torch.float32, set(), True) == [(EXACT, torch.float32)]
    sixteen = names(torch.bfloat16, {torch.bfloat16}, False)
    assert sixteen[0] == (EXACT, torch.float32)
    assert {rounds for rounds, _ in sixteen[1:]} == {n for n in TRACED if "reciprocal" not in n} - set(FLOAT32)
    assert {dtype for _, dtype in sixteen[1:]} == {torch.bfloat16}
    wide = names(torch.float32, {torch.bfloat16, torch.float16}, True)
    assert len(wide) == len(set(wide)) == 1 + 2 * len(TRACED)
    assert all(form.divides for form in roundings_of(torch.bfloat16, {torch.bfloat16}, True) if not form.exact)
    assert not any(form.divides for form in roundings_of(torch.bfloat16, {torch.bfloat16}, False))


def test_words_for_people():
    assert str(Roundings()) == "exact" and Roundings().exact
    assert str(Roundings("scale, weight", torch.bfloat16)) == "rounded twice in the model (bfloat16: scale, weight)"
    assert not Roundings("scale, weight", torch.bfloat16).exact
    assert str(Difference(3, 4, 1 / 3, -2.0)) == "row 3, column 4: expected 0.3333333, found -2"


def test_the_largest_error_is_relative_and_zeros_are_zero():
    weight, _ = weight_of(False)
    exact = weight.decode()
    assert largest_error(weight, exact) == 0
    off = exact.clone()
    off[7, 8] *= 1 - 2.0**-8
    assert largest_error(weight, off) == pytest.approx(2.0**-8, rel=1e-9)
    off[0, 0] = 1e-30  # its code is zero
    assert largest_error(weight, off) == float("inf")


@ROW
@EACH
def test_the_tolerance_of_a_form_is_half_a_unit_in_the_last_place_for_each_rounding(name, divides, dtype):
    tolerance, shown = Roundings(name, dtype, divides).tolerance
    assert tolerance == eval(shown) == len(name.split(", ")) * torch.finfo(dtype).eps / 2
