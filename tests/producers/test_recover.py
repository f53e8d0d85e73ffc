from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marlin_w4a16 import FP4Weight
from marlin_w4a16.kernels.scale_bytes import ScaleKind
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.recover import FORMULAS, dense, recover

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
# scale bytes: zero, all subnormals and some normal values of E4M3; E8M0 around one
BYTES = {"e4m3": [*range(8), 0x08, 0x30, 0x37, 0x38, 0x5D, 0x7E], "e8m0": range(118, 134)}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether signs of zeros agree too."""
    return a.dtype == b.dtype and torch.equal(a.view(INTEGERS[a.dtype]), b.view(INTEGERS[b.dtype]))


def drawn(kind: ScaleKind, n: int = 12, k: int = 96, seed: int = 0, scales: list[int] | None = None) -> FP4Weight:
    """Any codes, negative zeros too, under scales of a list."""
    g, group = torch.Generator().manual_seed(seed), 16 if kind == "e4m3" else 32
    choice = torch.tensor(scales or list(BYTES[kind]), dtype=torch.uint8)
    picked = choice[torch.randint(len(choice), (n, k // group), generator=g)]
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=g)
    return FP4Weight(codes, picked, torch.ones(n), kind, group)


def factor_for(formula: str, kind: ScaleKind) -> Tensor:
    if kind == "e8m0":
        return torch.ones(())
    return torch.tensor(437.31) if "/" in formula else torch.tensor(0.01234567)


def again(value: Tensor, weight: FP4Weight, factor: Tensor, formula: str) -> tuple[FP4Weight, str] | Rejected:
    return recover(value, [weight.scales], factor, weight.kind, divides="/" in formula)


@pytest.fixture(params=FORMULAS)
def formula(request) -> str:
    return request.param


@pytest.fixture(params=BYTES)
def kind(request) -> ScaleKind:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_dense_weight_gives_its_codes_and_they_give_it_again(kind, formula, dtype):
    weight, factor = drawn(kind), factor_for(formula, kind)
    value = dense(weight, factor, formula, dtype)
    assert (value == 0).any() and ((value == 0) & value.signbit()).any()
    found, name = again(value, weight, factor, formula)
    assert same_bits(dense(found, factor, name, dtype), value)
    assert (found.kind, found.group) == (weight.kind, weight.group) and torch.equal(found.scales, weight.scales)
    assert torch.equal(found.multiplier, (1 / factor if "/" in formula else factor).expand(weight.n))
    if dtype != torch.float16:  # some codes are one in its subnormals
        used = (weight.scales != 0).repeat_interleave(weight.group // 2, 1) | (kind == "e8m0")
        assert torch.equal(found.codes[used], weight.codes[used]) and not (found.codes[~used] & 0x77).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dense_weight_is_near_the_exact_decode(formula, dtype):
    weight, factor = drawn("e4m3"), factor_for(formula, "e4m3")
    weight.multiplier.copy_(1 / factor if "/" in formula else factor)
    exact = weight.decode()
    error = (dense(weight, factor, formula, dtype).double() - exact).abs()
    assert (error <= exact.abs() * (torch.finfo(dtype).eps + 2.0**-22) + 2.0**-24).all()


def test_the_formula_that_was_used_is_found(formula):
    """They differ in float32 where the factor has many bits."""
    weight, factor = drawn("e4m3", scales=list(range(0x7F))), factor_for(formula, "e4m3")
    assert again(dense(weight, factor, formula, torch.float32), weight, factor, formula)[1] == formula


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [(0, 0), (11, 95)])
@pytest.mark.parametrize("step", [1, -1])
def test_a_value_off_by_one_unit_in_the_last_place_is_rejected(kind, formula, dtype, at, step):
    weight, factor = drawn(kind, scales=[0x38 if kind == "e4m3" else 127]), factor_for(formula, kind)
    weight.codes[0, 0] = weight.codes[11, 47] = 0x3B  # not zero
    value = dense(weight, factor, formula, dtype)
    assert not isinstance(again(value, weight, factor, formula), Rejected)
    value.view(INTEGERS[dtype])[at] += step
    refused = again(value, weight, factor, formula)
    assert isinstance(refused, Rejected) and "not, bit for bit, the decode" in refused.reason


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e-6, 448.0])
def test_a_value_off_the_grid_is_rejected(kind, value):
    weight, factor = drawn(kind), torch.ones(())
    spoilt = dense(weight, factor, "code * (scale * factor)", torch.float32)
    spoilt[3, 3] = value
    assert isinstance(recover(spoilt, [weight.scales], factor, kind), Rejected)


def test_other_scales_are_rejected(kind):
    weight, factor = drawn(kind), torch.ones(())
    value = dense(weight, factor, "code * (scale * factor)", torch.float32)
    scales = weight.scales.clone()
    scales[2, 1] = 0x39 if kind == "e4m3" else 150
    assert isinstance(recover(value, [scales], factor, kind), Rejected)


def test_another_factor_is_rejected():
    weight, factor = drawn("e4m3"), torch.tensor(0.01234567)
    value = dense(weight, factor, "code * (scale * factor)", torch.float32)
    assert isinstance(recover(value, [weight.scales], torch.nextafter(factor, torch.ones(())), "e4m3"), Rejected)


def test_the_sign_of_a_zero_is_kept(kind):
    weight, factor = drawn(kind), torch.ones(())
    weight.codes[0] = 0x80  # zeros, every other one negative
    value = dense(weight, factor, "code * (scale * factor)", torch.float32)
    assert value[0].signbit().tolist() == [False, True] * 48
    assert torch.equal(recover(value, [weight.scales], factor, kind)[0].codes[0], weight.codes[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_at_both_ends_of_e8m0(dtype):
    weight, factor = drawn("e8m0", scales=[0, 1, 250, 251]), torch.ones(())
    value = dense(weight, factor, "code * (scale * factor)", dtype)
    assert torch.equal(recover(value, [weight.scales], factor, "e8m0")[0].codes, weight.codes)


def test_scales_may_be_float8_and_the_weight_strided(kind):
    weight, factor = drawn(kind), torch.ones(())
    value = dense(weight, factor, "code * (scale * factor)", torch.float32)
    scales = weight.scales.view(torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e8m0fnu)
    found, _ = recover(value.t().contiguous().t(), [scales], factor, kind)
    assert same_bits(dense(found, factor, "code * (scale * factor)", torch.float32), value)


def test_each_block_takes_the_first_scale_that_is_right(kind, formula):
    weight, factor = drawn(kind, scales=[0x38, 0x39] if kind == "e4m3" else [127, 128]), factor_for(formula, kind)
    value = dense(weight, factor, formula, torch.float32)
    low, high = (
        torch.full_like(weight.scales, int(weight.scales.min())),
        torch.full_like(weight.scales, int(weight.scales.max())),
    )
    for scales in ([low, high], [high, low]):
        found, name = recover(value, scales, factor, kind, divides="/" in formula)
        assert same_bits(dense(found, factor, name, torch.float32), value)
        assert torch.equal(found.scales, weight.scales) and torch.equal(found.codes, weight.codes)
    assert isinstance(again(value, replace(weight, scales=low), factor, formula), Rejected)
    value[0, 0] *= 1.25
    assert isinstance(recover(value, [low, high], factor, kind, divides="/" in formula), Rejected)


def test_a_weight_of_several_blocks_of_rows(formula):
    weight, factor = drawn("e4m3", 130, 16384), factor_for(formula, "e4m3")
    assert len(list(weight.row_blocks())) == 3
    value = dense(weight, factor, formula, torch.bfloat16)
    found, name = again(value, weight, factor, formula)
    assert same_bits(dense(found, factor, name, torch.bfloat16), value)
    value[-1, -1] = 3e-4
    assert isinstance(again(value, weight, factor, formula), Rejected)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(FORMULAS)),
    st.sampled_from(DTYPES),
    st.floats(2.0**-10, 2.0**10, width=32),
    st.integers(0, 1 << 30),
)
def test_any_factor_is_recovered(formula, dtype, factor, seed):
    weight, factor = drawn("e4m3", 4, 64, seed, scales=list(range(0x7F))), torch.tensor(factor)
    if dtype == torch.float16:
        factor = factor.clamp(2.0**-4, 2.0**4)
    value = dense(weight, factor, formula, dtype)
    found, name = again(value, weight, factor, formula)
    assert same_bits(dense(found, factor, name, dtype), value)
