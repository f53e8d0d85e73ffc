"""Weights that float16 does not hold as they are: what the model rounds them to is not their decode."""

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.judge.ranges import out_of_range
from marlin_w4a16.passes.outcome import Rejected, Replaced, Row
from programs.backend import reported

N, K = 48, 64
ROUNDED = pytest.mark.parametrize("half", [True, False], ids=["by itself", "by autocast"])


def run(module, half: bool, **options: object) -> tuple[Tensor, Tensor, Row]:
    """What the backend and the model give, and the row of the weight."""
    module.dtype = torch.float16 if half else torch.float32
    x = torch.randn(3, K, dtype=module.dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=not half):
        found, report = reported(module, (x,), **options)
        (row,) = report.rows
        return found, module(x), row


@ROUNDED
@pytest.mark.parametrize("scale", [1e5, 1e-5, 1e-7])
def test_a_weight_out_of_float16s_range_is_left(fp4_linear, half, scale):
    module = fp4_linear(N, K)
    module.factor *= scale
    found, expected, row = run(module, half)
    assert torch.equal(found.nan_to_num(), expected.nan_to_num()) and isinstance(row.outcome, Rejected)


@ROUNDED
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_a_weight_that_float16_holds_is_replaced(fp4_linear, assert_near, half, scale):
    module = fp4_linear(N, K)
    module.factor *= scale
    found, expected, row = run(module, half)
    assert_near(found, expected)
    assert isinstance(row.outcome, Replaced)


@ROUNDED
def test_a_tolerance_accepts_what_float16_rounds_to_few_bits(fp4_linear, half):
    module = fp4_linear(N, K)
    module.factor *= 1e-5
    *_, row = run(module, half)
    told = row.outcome.detail.partition("{'tolerance': ")[2].partition("}")[0]
    assert row.outcome.why == "below float16's normal range, to which the model rounds it"
    assert isinstance(run(module, half, tolerance=float(told))[2].outcome, Replaced)


def test_a_scale_written_out_of_range_is_seen(fp4_linear):
    module, x = fp4_linear(N, K), torch.randn(3, K)
    f = torch.compile(module, backend="marlin_w4a16")
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        f(x)
        module.factor *= 1e-6
        assert torch.equal(f(x), module(x))


def test_what_is_held_exactly_may_be_small():
    weight = quantize_mxfp4(torch.randn(N, K) * 2.0**-18)
    assert out_of_range(weight, torch.float16, 0.0) is None
    assert out_of_range(weight, torch.bfloat16, 0.0) is None
    weight.scales.fill_(127 - 25)
    assert out_of_range(weight, torch.float16, 0.0) is not None


def test_groups_of_zeros_are_in_range():
    weight = quantize_nvfp4(torch.randn(N, K))
    weight.codes[0], weight.scales[0] = 0, 1
    weight.multiplier[0] = 1e-9
    assert out_of_range(weight, torch.float16, 0.0) is None
    weight.codes[0, 0] = 1
    assert out_of_range(weight, torch.float16, 0.0) is not None
