import contextlib
import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import linear
from marlin_w4a16.backend import marlin_w4a16 as backend
from marlin_w4a16.cli import smoke

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1.75e-3), (torch.float16, 2.3e-4)])
def test_an_error_and_its_limit(dtype, limit):
    exact = torch.randn(64, 256, dtype=torch.float64)
    rounded = exact.to(dtype)
    error, most = smoke.relative_error(rounded, exact)
    assert 0.5 * limit < error <= most == limit and smoke.relative_error(rounded * 1.01, exact)[0] > limit
    one = torch.full((1, 1), 1 + 2.0**-9, dtype=torch.float64)  # as far from bfloat16 as can be
    error, most = smoke.relative_error(one.bfloat16(), one)
    assert 1.75e-3 < error < most < 1.03 * error


@pytest.mark.parametrize("change", ["nan", "inf", "shape", "dtype"])
def test_what_is_no_result_at_all_is_infinitely_wrong(change):
    exact = torch.randn(4, 8, dtype=torch.float64)
    out = exact.bfloat16()
    if change in ("nan", "inf"):
        out[3, 7] = float(change)
    error, limit = smoke.relative_error({"shape": out[:3], "dtype": out.float()}.get(change, out), exact)
    assert error == float("inf") > limit


def test_the_linears_of_this_machine_are_right():
    checks = smoke.try_linears(CPU)
    assert [check.status for check in checks] == ["ok"] * 4
    assert [check.name.rsplit(",", 1)[0] for check in checks] == [
        f"{name}, {dtype}" for name in ("NVFP4 group 16", "MXFP4 group 32") for dtype in ("bfloat16", "float16")
    ]
    assert all("4 products are right" in check.found for check in checks)


WRONG = {
    "a little": lambda x, packed, bias: linear(x, packed, bias) * 1.01,
    "no bias": lambda x, packed, bias: linear(x, packed),
    "NaN": lambda x, packed, bias: linear(x, packed, bias).fill_(torch.nan),
    "float32": lambda x, packed, bias: linear(x, packed, bias).float(),
}


@pytest.mark.parametrize("op", WRONG.values(), ids=WRONG)
def test_wrong_linears_are_a_problem(op):
    assert [check.status for check in smoke.try_linears(CPU, op)] == ["problem"] * 4


@pytest.mark.parametrize("m, n, k", smoke.CASES)
def test_one_wrong_product_is_named(m, n, k):
    def op(x: Tensor, packed, bias) -> Tensor:
        out = linear(x, packed, bias)
        if len(x) == m and x.dtype == torch.float16:
            out[-1, -1] += 8
        return out

    right, wrong, *_ = smoke.try_linears(CPU, op)
    assert right.status == "ok" and wrong.status == "problem" and wrong.advice
    assert wrong.found.startswith(f"wrong results: {m} x {k} by {n} x {k}: ") and ";" not in wrong.found


def test_a_compiled_model_is_replaced_and_right():
    check = smoke.try_compiled(CPU)
    assert check.status == "ok", check
    assert check.found.startswith("replaced 1 of 1 FP4 linears (1 NVFP4 group 16; 1 CPU blocks)")


def test_a_weight_that_is_not_replaced_is_a_problem():
    check = smoke.try_compiled(CPU, partial(backend, options={"exclude": "*"}))
    assert check.status == "problem" and check.found.startswith("excluded 1")


def test_a_compiled_model_that_is_wrong_is_a_problem():
    def wrong(gm, inputs):
        compiled = backend(gm, inputs)
        return lambda *args: tuple(out * 1.01 for out in compiled(*args))

    check = smoke.try_compiled(CPU, wrong)
    assert check.status == "problem" and check.found.startswith("wrong result") and "replaced 1 of 1" in check.found


def test_a_backend_that_is_not_called_is_a_problem():
    check = smoke.try_compiled(CPU, lambda gm, inputs: gm.forward)
    assert check.status == "problem" and "TORCH_COMPILE_DISABLE" in check.advice


def test_a_compile_leaves_the_logger_as_it_was(caplog):
    log = logging.getLogger("marlin_w4a16")
    log.setLevel(logging.ERROR)
    try:
        smoke.try_compiled(CPU, lambda gm, inputs: log.info("replaced 1 of 1") or gm.forward)
        assert (log.level, log.propagate) == (logging.ERROR, True)
        assert not any(isinstance(handler, smoke._Lines) for handler in log.handlers)
        assert "marlin_w4a16" not in {record.name for record in caplog.records}
    finally:
        log.setLevel(logging.NOTSET)


@pytest.fixture
def graphs(monkeypatch) -> SimpleNamespace:
    """CUDA graphs without CUDA: ``op`` is captured between the ends of the context, a replay runs it again."""
    state = SimpleNamespace(capturing=False, captured=[], replays=True)

    @contextlib.contextmanager
    def capture(graph):
        state.capturing = True
        yield
        state.capturing = False

    def op(x: Tensor, packed, bias) -> Tensor:
        out = linear(x, packed, bias)
        if state.capturing:
            state.captured.append(lambda: out.copy_(linear(x, packed, bias)))
        return out

    def replay() -> None:
        for run in state.captured if state.replays else ():
            run()

    state.op = op
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    return state


@pytest.mark.parametrize("replays, status", [(True, "ok"), (False, "problem")])
def test_a_replay_must_see_new_contents(graphs, replays, status):
    graphs.replays = replays
    assert smoke.try_graph(CPU, graphs.op).status == status and len(graphs.captured) == 1


def test_triton_compiles_without_a_gpu():
    pytest.importorskip("triton")
    for capability, name in (((9, 0), "sm_90"), ((8, 0), "sm_80")):
        check = smoke.try_triton(capability)
        assert (check.name, check.status) == (f"Triton for {name}", "ok") and "KiB" in check.found
