"""The quantisers against ModelOpt, torchao and the format's definition in exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4

QUANTISERS = (quantize_nvfp4, quantize_mxfp4)
MAGNITUDES = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]  # midpoints, and what keeps the scale at one
TIE_CODES = [0, 2, 2, 4, 4, 6, 6, 7]


def of_ordinary_size() -> Tensor:
    return torch.randn(64, 256) * 0.02


def with_blocks_of_zeros() -> Tensor:
    weight = torch.randn(16, 256)
    weight[:, 32:96] = 0
    weight[3] = 0
    return weight


def of_few_values() -> Tensor:
    return torch.randint(-24, 25, (32, 256)) * 0.25


def of_every_magnitude() -> Tensor:
    return torch.randn(32, 256) * torch.randint(-60, 60, (32, 8)).double().exp2().repeat_interleave(32, 1)


def tiny() -> Tensor:
    return torch.randn(16, 256).double() * 2.0**-112


def huge() -> Tensor:
    return (torch.rand(16, 256).double() - 0.5) * 2.0**128


WEIGHTS = [of_ordinary_size, with_blocks_of_zeros, of_few_values, of_every_magnitude, tiny, huge]
DTYPES = [torch.float32, torch.bfloat16]


def nearest_code(value: Fraction) -> int:
    """Ties to even, saturated; only a value below zero is negative."""
    distances = [abs(abs(value) - magnitude) for magnitude in MAGNITUDES]
    best = [code for code, distance in enumerate(distances) if distance == min(distances)]
    return (best[0] if len(best) == 1 else next(code for code in best if code % 2 == 0)) + 8 * (value < 0)


def by_definition(block: list[float]) -> tuple[int, list[int]]:
    """Scale byte and codes of an MXFP4 block that is not all zeros."""
    exponent = math.frexp(max(map(abs, block)))[1] - 1
    byte = min(max(exponent - 2 + 127, 0), 254)
    return byte, [nearest_code(Fraction(value) / Fraction(2) ** (byte - 127)) for value in block]


def nibbles(codes: Tensor) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_nvfp4_is_modelopts_bit_for_bit(weight, dtype, group):
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    dense = weight().to(dtype)
    codes, scales, double_scale = modelopt.NVFP4QTensor.quantize(dense.clone(), group)
    ours = quantize_nvfp4(dense, group)
    assert torch.equal(ours.codes, codes._quantized_data) and torch.equal(ours.scales, scales.view(torch.uint8))
    assert torch.equal(ours.multiplier, double_scale.expand(len(dense)))


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_mxfp4_is_torchaos_bit_for_bit_but_for_the_free_scale_of_zeros(weight, dtype, group):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    dense = weight().to(dtype)
    scales, codes = mx.to_mx(dense, torch.float4_e2m1fn_x2, group, mx.ScaleCalculationMode.FLOOR)
    ours, used = quantize_mxfp4(dense, group), dense.unflatten(1, (-1, group)).any(-1)
    assert torch.equal(ours.codes, codes.view(torch.uint8))
    assert torch.equal(ours.scales[used], scales.view(torch.uint8)[used])


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("power", [-149, -140, -127, -126, -125, -124, -123, 0, 60, 125])
def test_mxfp4_is_the_definition_down_to_subnormals_which_torchao_scales_by_half(power, group):
    """torchao divides by 2**-126 where it stores the scale 2**-127."""
    dense = (torch.randn(4, 64).clamp(-7, 7).double() * 2.0**power).float()
    ours, blocks = quantize_mxfp4(dense, group), dense.unflatten(1, (-1, group)).flatten(0, 1)
    expected = [by_definition(block) for block in blocks.tolist() if any(block)]
    used = blocks.any(-1)
    assert ours.scales.flatten()[used].tolist() == [byte for byte, _ in expected]
    assert nibbles(ours.codes).view(-1, group)[used].tolist() == [codes for _, codes in expected]
    assert not nibbles(ours.codes).view(-1, group)[~used].any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_tie_goes_to_the_even_code(quantise, dtype):
    dense = torch.tensor([TIES * 4, [-v for v in TIES] * 4, [448 * v for v in TIES] * 4], dtype=dtype)
    codes = nibbles(quantise(dense, 32).codes)
    assert codes[0].tolist() == TIE_CODES * 4 and codes[1].tolist() == [code + 8 for code in TIE_CODES] * 4


@pytest.mark.parametrize("quantise", QUANTISERS)
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_decode_to_zeros(quantise, value):
    weight = quantise(torch.full((3, 64), value), 32)
    assert not weight.codes.any() and not weight.decode().any()


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("weight", [of_ordinary_size, with_blocks_of_zeros, tiny, huge])
def test_no_value_moves_by_more_than_its_blocks_largest_half_step(weight, group):
    dense = weight().float()
    for quantised, step in ((quantize_nvfp4(dense, group), 1), (quantize_mxfp4(dense, group), 2)):
        _, scales = quantised.factors(torch.float64)
        bound = (scales * quantised.multiplier.double()[:, None] * step).repeat_interleave(group, 1)
        assert ((quantised.decode() - dense.double()).abs() <= bound).all()


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_strided_parameter_gives_what_its_contiguous_copy_gives(quantise):
    dense = torch.nn.Parameter(torch.randn(64, 32)).t()
    strided, contiguous = quantise(dense, 32), quantise(dense.detach().contiguous(), 32)
    for field in ("codes", "scales", "multiplier"):
        tensor = getattr(strided, field)
        assert torch.equal(tensor, getattr(contiguous, field)) and not tensor.requires_grad


@pytest.mark.parametrize(
    "message, dense, group",
    [
        ("found torch.float32 of shape (64,), expected floats [n, k]", torch.zeros(64), 16),
        ("found torch.float32 of shape (2, 2, 64), expected floats [n, k]", torch.zeros(2, 2, 64), 16),
        ("found torch.int64 of shape (2, 64), expected floats [n, k]", torch.zeros(2, 64).long(), 16),
        ("found k = 48, expected a multiple of the group 32", torch.zeros(2, 48), 32),
        ("found NaN or Inf, expected finite values", torch.tensor([[math.nan] + [1.0] * 31]), 32),
        ("found NaN or Inf, expected finite values", torch.tensor([[-math.inf] + [1.0] * 31]), 32),
        ("group: found 8, expected one of (16, 32)", torch.ones(2, 64), 8),
    ],
)
@pytest.mark.parametrize("quantise", QUANTISERS)
def test_what_cannot_be_quantised_is_refused_by_name(quantise, message, dense, group):
    with pytest.raises(ValueError) as error:
        quantise(dense, group, name="up")
    assert str(error.value).startswith(f"up: {message}")
