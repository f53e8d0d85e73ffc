"""Products that the op would compute in another type or range than they are."""

import pytest
import torch
from torch.nn.functional import linear

from marlin_w4a16 import E2M1_VALUES
from marlin_w4a16.passes.outcome import Replaced
from programs.backend import reported

N, K = 48, 64
LUT = torch.tensor(E2M1_VALUES)

ADDED = {
    "addmm": lambda x, w: torch.addmm(x[:, :1], x, w.T, beta=-0.5, alpha=0.25),
    "addmm of rows": lambda x, w: torch.addmm(x[:, :N], x, w.T),
    "baddbmm": lambda x, w: torch.baddbmm(x[None, :, :1], x[None], w.T[None], alpha=0.25)[0],
    "addmv": lambda x, w: torch.addmv(torch.ones(N, dtype=w.dtype), w, x[0], alpha=0.25),
}


def outcome_of(function, *args):
    """What becomes of the one weight of a function, which gives what it gave; the reason where it is left."""
    found, report = reported(function, args)
    expected, (row,) = function(*args), report.rows
    assert found.dtype == expected.dtype and torch.equal(found.isfinite(), expected.isfinite())
    fine = expected.isfinite()
    assert (found[fine].double() - expected[fine].double()).norm() <= 1e-2 * expected[fine].double().norm()
    return None if isinstance(row.outcome, Replaced) else row.outcome.reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("multiply", ADDED.values(), ids=ADDED)
def test_a_sum_in_range_of_a_product_that_is_not(fp4_linear, multiply, dtype):
    """The op rounds the product before it is multiplied and added to, which float16 may not hold."""
    module = fp4_linear(N, K, dtype=dtype)
    x = torch.ones(3, K, dtype=dtype) * module.weight().float()[0].sign().to(dtype) * 2000
    reason = outcome_of(lambda x: multiply(x, module.weight()), x)
    assert (reason is None) == (dtype != torch.float16), reason
    assert reason is None or "may be in range where the product is not" in reason


def test_a_bias_in_float16_is_added_by_the_op(fp4_linear):
    module, bias = fp4_linear(N, K, dtype=torch.float16), torch.ones(N).half()
    assert outcome_of(lambda x: torch.addmm(bias, x, module.weight().T), torch.randn(3, K).half()) is None


OF_VECTORS = {
    "mv": lambda x, w: torch.mv(w, x[0]),
    "addmv": lambda x, w: torch.addmv(torch.ones(N), w, x[0]),
    "@": lambda x, w: w @ x[0],
    "F.linear": lambda x, w: linear(x, w, torch.ones(N)),
    "addmm": lambda x, w: torch.addmm(torch.ones(N), x, w.T),
}


@pytest.mark.parametrize("region", [True, False], ids=["in a region", "around it"])
@pytest.mark.parametrize("name", OF_VECTORS)
def test_what_autocast_takes_no_notice_of(fp4_linear, name, region):
    module, multiply = fp4_linear(N, K), OF_VECTORS[name]

    def function(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=region or torch.is_autocast_enabled("cpu")):
            return multiply(x, module.weight())

    with torch.autocast("cpu", torch.bfloat16, enabled=not region):
        reason = outcome_of(function, torch.randn(3, K))
    lowered = name not in ("mv", "addmv")  # on a CPU
    assert (reason is None) == lowered, reason
    assert lowered or "found float32, expected bfloat16" in reason


@pytest.mark.parametrize("table", [lambda: LUT, lambda: LUT.view(-1, 2).flatten(), lambda: LUT.flip(0).flip(0)])
def test_a_table_that_is_a_global_may_have_a_size_that_changes(fp4_linear, table):
    module = fp4_linear(N, K)

    def function(x):
        module.table = table()
        return module(x)

    with torch._dynamo.config.patch(assume_static_by_default=False):
        assert outcome_of(function, torch.randn(3, K)) is None
