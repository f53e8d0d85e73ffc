"""An error inside the pass: the graph runs as traced, and the report says why."""

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import marlin_w4a16.backend
from marlin_w4a16 import explain

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
WHY = "the pass failed, so the whole graph is left: AttributeError: no such thing"


@pytest.fixture(
    params=["rewrite.Traced", "rewrite.find_units", "replace.linear.fake_result", "replace.edit.Edit.finish"]
)
def failing(request, monkeypatch) -> None:
    """Something fails; of two products, the second."""
    calls = []

    def fail(*args):
        calls.append(args)
        if "fake_result" not in request.param or len(calls) > 1:
            raise AttributeError("no such thing")
        return original(*args)

    from marlin_w4a16.passes.replace.linear import fake_result as original

    monkeypatch.setattr(f"marlin_w4a16.passes.{request.param}", fail)
    monkeypatch.setattr(marlin_w4a16.backend, "compile_graph", lambda gm, *_: gm.forward)


@pytest.fixture
def model(fp4_linear) -> nn.Module:
    return nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))


def test_the_graph_runs_as_traced(failing, model, said):
    assert torch.equal(torch.compile(model, backend="marlin_w4a16")(X), model(X))
    ((level, message),) = said()
    assert level == "WARNING" and message.endswith(f"left 1: 1 {WHY}")


def test_under_strict_it_raises(failing, model):
    with pytest.raises(BackendCompilerFailed, match=f"NotReplaced: .*\n.*{WHY}"):
        torch.compile(model, backend="marlin_w4a16", options={"strict": True})(X)


def test_a_dry_run_says_so(monkeypatch, model):
    def fail(*_):
        raise AttributeError("no such thing")

    monkeypatch.setattr("marlin_w4a16.passes.rewrite.find_units", fail)
    report = explain(model, X)
    assert [row.outcome.reason for row in report.rows] == [WHY] and "1 left" in str(report)
    report.to_json()
