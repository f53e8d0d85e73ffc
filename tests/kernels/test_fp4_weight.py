"""Building a weight: what is accepted, and what an error says of what is not."""

import math

import pytest
import torch

from marlin_w4a16.kernels.fp4 import FP4Weight, fp4_weight

GOOD = dict(
    codes=torch.zeros(2, 32, dtype=torch.uint8), scales=torch.full((2, 4), 0x38, dtype=torch.uint8),
    multiplier=torch.ones(2), kind="e4m3", group=16, name="layers.3.up",
)  # fmt: skip


def last(parameter: str, value: float) -> torch.Tensor:
    tensor = GOOD[parameter].clone()
    tensor.view(-1)[-1] = value
    return tensor


@pytest.mark.parametrize(
    "parameter, found, expected, change",
    [
        ("kind", "'e5m2'", "one of ('e4m3', 'e8m0')", dict(kind="e5m2")),
        ("group", "8", "one of (16, 32)", dict(group=8, scales=torch.zeros(2, 8, dtype=torch.uint8))),
        ("codes", "dtype torch.int8", "torch.uint8", dict(codes=GOOD["codes"].to(torch.int8))),
        ("scales", "dtype torch.float32", "torch.uint8", dict(scales=GOOD["scales"].float())),
        ("scales", "dtype torch.float8_e4m3fn", "torch.uint8", dict(scales=GOOD["scales"].view(torch.float8_e4m3fn))),
        ("multiplier", "dtype torch.float64", "torch.float32", dict(multiplier=GOOD["multiplier"].double())),
        ("scales", "device meta", "codes' cpu", dict(scales=GOOD["scales"].to("meta"))),
        ("multiplier", "device meta", "codes' cpu", dict(multiplier=GOOD["multiplier"].to("meta"))),
        ("codes", "shape (32,)", "[..., n, k / 2]", dict(codes=GOOD["codes"][0])),
        ("codes", "k = 62", "a multiple of the group 16", dict(codes=GOOD["codes"][:, 1:])),
        ("codes", "k = 48", "a multiple of the group 32", dict(codes=GOOD["codes"][:, 8:], group=32)),
        ("scales", "shape (2, 4)", "(2, 2)", dict(group=32)),
        ("scales", "shape (1, 4)", "(2, 4)", dict(scales=GOOD["scales"][:1])),
        ("scales", "shape (2, 2, 4)", "(2, 4)", dict(scales=GOOD["scales"].expand(2, 2, 4))),
        ("multiplier", "shape ()", "(2,)", dict(multiplier=torch.tensor(1.0))),
        ("multiplier", "shape (3,)", "(2,)", dict(multiplier=torch.ones(3))),
        ("scales", "NaN (byte 0x7f) at [1, 3]", "finite e4m3", dict(scales=last("scales", 0x7F))),
        ("scales", "NaN (byte 0xff) at [1, 3]", "finite e4m3", dict(scales=last("scales", 0xFF))),
        ("scales", "NaN (byte 0xff) at [1, 3]", "finite e8m0", dict(scales=last("scales", 0xFF), kind="e8m0")),
        ("multiplier", "nan at [1]", "finite", dict(multiplier=last("multiplier", math.nan))),
        ("multiplier", "-inf at [1]", "finite", dict(multiplier=last("multiplier", -math.inf))),
    ],
)  # fmt: skip
def test_an_error_says_which_weight_and_parameter_what_was_found_and_what_expected(parameter, found, expected, change):
    with pytest.raises(ValueError) as error:
        FP4Weight(**GOOD | change)
    assert str(error.value).startswith(f"layers.3.up: {parameter}: found {found}, expected {expected}")


def test_byte_0x7f_is_a_number_in_e8m0():
    FP4Weight(**GOOD | dict(scales=last("scales", 0x7F), kind="e8m0"))


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 0), (0, 3, 32)])
def test_an_empty_weight_is_a_weight(shape):
    *rows, k = shape
    empty = [torch.zeros(*rows, columns, dtype=torch.uint8) for columns in (k // 2, k // 16)]
    weight = FP4Weight(*empty, torch.ones(rows), "e8m0", 16)
    assert weight.decode(torch.float16).shape == shape and weight.fit(torch.float16) is weight


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("dtype, kind", [(torch.float8_e4m3fn, "e4m3"), (torch.float8_e8m0fnu, "e8m0")])
def test_a_float8_scale_tells_kind_and_group(dtype, kind, group):
    scales = torch.randint(0x7F, (2, 64 // group), dtype=torch.uint8)
    weight = fp4_weight(GOOD["codes"], scales.view(dtype))
    assert (weight.kind, weight.group) == (kind, group) and torch.equal(weight.scales, scales)
    assert torch.equal(fp4_weight(GOOD["codes"], scales, kind=kind).decode(), weight.decode())


def test_int8_codes_are_bytes():
    codes = torch.randint(256, (2, 32), dtype=torch.uint8)
    assert torch.equal(fp4_weight(codes.view(torch.int8), GOOD["scales"], kind="e4m3").codes, codes)


@pytest.mark.parametrize(
    "multiplier, rows",
    [
        (0.5, [0.5, 0.5]), (3, [3.0, 3.0]), (torch.tensor(0.5), [0.5, 0.5]), (torch.tensor([0.5]), [0.5, 0.5]),
        (torch.tensor([0.5, -2.0], dtype=torch.bfloat16), [0.5, -2.0]),
        (torch.tensor([1.0, 9.0, 2.0, 9.0])[::2], [1.0, 2.0]),
    ],
)  # fmt: skip
def test_a_multiplier_is_one_number_or_one_for_each_row(multiplier, rows):
    weight = fp4_weight(GOOD["codes"], GOOD["scales"], multiplier, kind="e4m3")
    assert weight.multiplier.tolist() == rows and weight.multiplier.is_contiguous()


@pytest.mark.parametrize(
    "message, scales, more",
    [
        ("scales: found dtype torch.uint8 and kind None, expected float8", GOOD["scales"], {}),
        ("scales: found dtype torch.float32", GOOD["scales"].float(), dict(kind="e4m3")),
        ("scales: found dtype torch.float8_e5m2", GOOD["scales"].view(torch.float8_e5m2), dict(kind="e4m3")),
        ("scales: found shape (8,), expected [n, k / group]", GOOD["scales"].view(-1), dict(kind="e4m3")),
        ("scales: found shape (2, 0), expected", GOOD["scales"][:, :0], dict(kind="e4m3")),
        ("scales: found shape (2, 3), expected", GOOD["scales"][:, :3], dict(kind="e4m3")),
        ("group: found 64, expected one of (16, 32)", GOOD["scales"][:, :1], dict(kind="e4m3")),
        ("kind: found 'e3m4', expected one of", GOOD["scales"], dict(kind="e3m4")),
        ("multiplier: found shape (3,), expected (2,)", GOOD["scales"], dict(kind="e4m3", multiplier=torch.ones(3))),
        ("multiplier: found inf at [0], expected finite", GOOD["scales"], dict(kind="e4m3", multiplier=1e40)),
    ],
)
def test_fp4_weight_refuses_what_no_checkpoint_means(message, scales, more):
    with pytest.raises(ValueError) as error:
        fp4_weight(GOOD["codes"], scales, name="up", **more)
    assert str(error.value).startswith(f"up: {message}")


def test_sizes():
    weight = fp4_weight(GOOD["codes"], GOOD["scales"], kind="e4m3")
    assert (weight.n, weight.k, weight.nbytes) == (2, 64, 2 * (32 + 4 + 4))
