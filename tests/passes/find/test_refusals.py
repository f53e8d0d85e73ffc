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


def stretched(x, w):
    y = linear(x, w)
    y.unsqueeze_(0)
    return y


def turned(x, w):
    h = x.unsqueeze(1) * 1
    y = torch.bmm(h, w.unflatten(0, (3, -1)).mT)
    h.transpose_(0, 1)
    return y


IN_PLACE = {"a result": stretched, "an input of one": turned}


@pytest.mark.parametrize("multiply", IN_PLACE.values(), ids=IN_PLACE)
def test_what_gets_another_shape_in_place(fp4_linear, multiply):
    """Dynamo's examples show the last shape that a tensor had."""
    module = fp4_linear(N, K)
    reason = outcome_of(lambda x: multiply(x, module.weight()), torch.randn(3, K))
    assert "gets another shape in place" in reason


def test_an_argument_by_its_place_that_is_not_known(fp4_linear):
    module, x = fp4_linear(N, K), torch.randn(3, K)

    def function(x):
        out = torch.zeros(3, N)
        torch.tensordot(x, module.weight(), ([1], [1]), out)
        return out

    assert outcome_of(function, x) == "tensordot with argument 4="


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


FACTORS = {
    "tensordot by a number of axes that changes": lambda x, w, n: torch.tensordot(x, w.T, dims=n),
    "tensordot by a tensor": lambda x, w, n: torch.tensordot(x, w.T, dims=torch.tensor(1)),
}


@pytest.mark.parametrize("multiply", FACTORS.values(), ids=FACTORS)
def test_axes_that_are_no_numbers_are_left(fp4_linear, multiply):
    module = fp4_linear(N, K)
    with torch._dynamo.config.patch(assume_static_by_default=False):
        _, report = reported(lambda x, n: multiply(x, module.weight(), n), (torch.randn(3, K), 1))
    assert not any(row.path == "(the graph)" for row in report.rows)


@pytest.mark.usefixtures("without_inductor")
def test_a_factor_that_changes_between_calls(fp4_linear):
    module = fp4_linear(N, K)
    run = torch.compile(lambda x, a, b: torch.addmm(a, x, module.weight().T, beta=b), backend="marlin_w4a16")
    x = torch.randn(3, K)
    for beta in (2, 3, 0):
        addend = torch.full((3, N), torch.nan if beta == 0 else 1.0)
        expected = torch.addmm(addend, x, module.weight().T, beta=beta)
        torch.testing.assert_close(run(x, addend, beta), expected, rtol=1e-4, atol=1e-4)


def test_sizes_that_data_tell_are_no_hindrance(fp4_linear):
    module = fp4_linear(N, K)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        chosen = lambda x: module(x) + LUT[LUT > 0].sum() + (LUT > 0).nonzero().sum()  # noqa: E731
        assert outcome_of(chosen, torch.randn(3, K)) is None


def test_on_a_device_without_autocast(fp4_linear):
    module = fp4_linear(N, K).to("meta")
    _, report = reported(module, (torch.randn(3, K, device="meta"),))
    (row,) = report.rows
    assert "expected cuda or cpu" in row.outcome.reason


FOLLOWED = {
    "conv1d": lambda x, w: torch.conv1d(x.T[None], w[:, :, None]).view(1, -1),
    "conv2d": lambda x, w: torch.conv2d(x.T[None, :, :, None], w[:, :, None, None]).view(1, -1),
    "weight on the left": lambda x, w: (w @ x.T).view(-1),
    "mm": lambda x, w: torch.mm(w, x.T).view(torch.int32),
    "a batch": lambda x, w: torch.matmul(w, x.T[None].expand(2, -1, -1)).view(2, -1),
    "einsum": lambda x, w: torch.einsum("bk,nk->nb", x, w).view(-1),
    "pairs of one": lambda x, w: torch.view_as_complex((w @ x.T).unflatten(-1, (-1, 2))),
    "strides that are read": lambda x, w: (y := torch.mm(w, x.T)).as_strided((3, 4), y.stride()),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_result_has_the_strides_that_were_traced(fp4_linear, name):
    module, follow = fp4_linear(N, K), FOLLOWED[name]
    x = torch.randn(4, K)
    found, report = reported(lambda x: follow(x, module.weight()), (x,))
    expected = follow(x, module.weight())
    assert all(isinstance(row.outcome, Replaced) for row in report.rows) and report.rows
    assert found.stride() == expected.stride()
    if found.is_floating_point() or found.is_complex():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
