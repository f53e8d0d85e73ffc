"""The input of a W4A4 product, rounded as its producers do."""

import math
from itertools import pairwise

import pytest
import torch

from marlin_w4a16.kernels.fp4 import E2M1_VALUES
from marlin_w4a16.kernels.inputs import fake_quantize, round_e2m1
from marlin_w4a16.kernels.quantize import encode, quantize_nvfp4

GRID = torch.tensor(E2M1_VALUES)


def test_round_e2m1_is_the_nearest_value_with_ties_to_even():
    between = [(a + b) / 2 for a, b in pairwise(E2M1_VALUES[:8])]
    near = [math.nextafter(t, direction) for t in between for direction in (0.0, 9.0)]
    values = torch.tensor([*E2M1_VALUES, *between, *near, 100.0], dtype=torch.float64)
    values = torch.cat((values, -values))
    assert torch.equal(round_e2m1(values), GRID.double()[encode(values).int()])
    assert torch.equal(round_e2m1(values).signbit(), values.signbit())


def test_e4m3_blocks_are_those_of_a_weight_quantised_alike():
    x = torch.randn(5, 64) * torch.tensor([[1.0], [30.0], [1e-3], [1e-2], [5.0]])
    weight = quantize_nvfp4(x)
    found = fake_quantize(x, "e4m3", 16, weight.multiplier[0])
    torch.testing.assert_close(found, weight.decode(torch.float32), rtol=1e-6, atol=0)
    assert fake_quantize(x.bfloat16(), "e4m3", 16, weight.multiplier[0]).dtype == torch.bfloat16


def test_a_block_whose_scale_rounds_to_zero_becomes_zero():
    x = torch.randn(2, 32)
    x[0, :16] *= 1e-9
    x[1, 16:] = 0
    found = fake_quantize(x, "e4m3", 16, torch.tensor(1e-3))
    assert not found[0, :16].any() and not found[1, 16:].any() and found[0, 16:].any() and not found.isnan().any()


def test_without_a_global_scale_it_is_one():
    x = torch.randn(3, 32)
    assert torch.equal(fake_quantize(x, "e4m3", 16), fake_quantize(x, "e4m3", 16, torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("amax", "rounding", "exponent"),
    [(6.0, "near", 0), (6.99, "near", 0), (7.0, "near", 1), (4.0, "near", 0), (6.0, "up", 0), (6.01, "up", 1),
     (3.0, "up", -1), (3.01, "up", 0)],
)  # fmt: skip
def test_e8m0_scales(amax, rounding, exponent):
    x, step = torch.linspace(-amax, amax, 32)[None], 2.0**exponent
    assert torch.equal(fake_quantize(x, "e8m0", 32, rounding=rounding), round_e2m1(x / step) * step)


@pytest.mark.parametrize(("preset", "kind", "group"), [("NVFP4", "e4m3", 16), ("MXFP4", "e8m0", 32)])
def test_inputs_are_those_of_compressed_tensors(preset, kind, group):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    x = torch.randn(9, 4 * group) * torch.randn(9, 1).exp()
    x[0, :group] *= 1e-9
    linear = torch.nn.Linear(4 * group, 8)
    linear.quantization_scheme = quantization.preset_name_to_scheme(preset, ["Linear"])
    linear.quantization_enabled, linear.quantization_status = True, None
    divisor = torch.tensor([6 * 448]) / x.abs().max() if kind == "e4m3" else None
    linear.input_global_scale = divisor
    expected = forward_quantize(linear, x, "input", linear.quantization_scheme.input_activations)
    found = fake_quantize(x, kind, group, None if divisor is None else divisor[0].reciprocal())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_it_is_one_graph():
    x = torch.randn(4, 64)
    compiled = torch.compile(fake_quantize, backend="eager", fullgraph=True)
    for kind, group in (("e4m3", 16), ("e8m0", 32)):
        assert torch.equal(compiled(x, kind, group), fake_quantize(x, kind, group))
