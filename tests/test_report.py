import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import Report, explain, quantize_mxfp4
from marlin_w4a16.passes.outcome import Rejected, Replaced, Row

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
OP = "marlin_w4a16::linear"


def row(path: str, outcome: Replaced | Rejected, uses: int = 1) -> Row:
    return Row(path, "F.linear", (96, 64), "NVFP4 group 16", outcome, 3456, uses)


@pytest.fixture
def report() -> Report:
    return Report(
        (
            row("up", Replaced(OP, "Triton", 3 << 20)),
            row("mlp.down", Replaced(OP, "Triton", 1 << 20), uses=2),
            Row("odd", "matmul", (8, 1024), None, Rejected("it is NF4"), 99),
        ),
        graphs=2,
    )


def test_rows_are_told_apart(report):
    assert [r.path for r in report.replaced] == ["up", "mlp.down"]
    assert [r.path for r in report.rejected] == ["odd"]


def test_the_summary_is_one_line(report):
    assert report.summary() == (
        "replaced 2 of 3 FP4 linears (2 NVFP4 group 16; 2 Triton), packed copies of 4.0 MiB beside the originals; "
        "left 1: 1 it is NF4"
    )


def test_the_summary_of_nothing_replaced():
    assert Report((row("odd", Rejected("it is NF4")),)).summary() == "replaced 0 of 1 FP4 linears; left 1: 1 it is NF4"


def test_small_copies_are_counted_in_kibibytes():
    assert "packed copies of 1.5 KiB" in Report((row("up", Replaced(OP, "Triton", 1536)),)).summary()


def test_the_table(report):
    assert str(report).splitlines() == [
        "weight    shape     format          product       outcome",
        "up        96 x 64   NVFP4 group 16  F.linear      marlin_w4a16::linear (Triton)",
        "mlp.down  96 x 64   NVFP4 group 16  F.linear x 2  marlin_w4a16::linear (Triton)",
        "odd       8 x 1024  -               matmul        it is NF4",
    ]


def test_the_table_of_nothing():
    assert str(Report(())).split() == ["weight", "shape", "format", "product", "outcome"]


@pytest.fixture
def model(fp4_linear) -> nn.Module:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = fp4_linear(64, 64), fp4_linear(32, 64, quantize_mxfp4)
            self.third, self.dense = fp4_linear(32, 32), nn.Linear(32, 32)
            self.third.table[5] = 2.9

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return self.dense(self.third(self.second(self.first(self.first(x)))) * scale)

    return Model()


def test_a_model_is_explained_weight_by_weight(model):
    report = explain(model, X, scale=0.5)
    assert report.graphs == 1
    found = [(r.path, r.shape, r.format, r.uses, type(r.outcome)) for r in report.rows]
    assert found == [
        ("first.codes", (64, 64), "NVFP4 group 16", 2, Replaced),
        ("second.codes", (32, 64), "MXFP4 group 32", 1, Replaced),
        ("third.codes", (32, 32), None, 1, Rejected),
    ]
    assert report.rejected[0].outcome.reason.startswith("its value is not the decode of its codes and scales")
    assert report.summary().startswith(
        "replaced 2 of 3 FP4 linears (1 NVFP4 group 16, 1 MXFP4 group 32; 2 CPU blocks); left 1: 1 its value"
    )


def test_bytes_before_are_those_of_the_tensors_of_a_weight(model):
    linear = model.second
    tensors = (linear.codes, linear.scales, linear.factor, linear.table)
    assert explain(model, X).rows[1].nbytes == sum(t.nbytes for t in tensors)


def test_it_packs_and_compiles_nothing(model, monkeypatch, caplog):
    caplog.set_level("DEBUG", "marlin_w4a16")
    for name in ("marlin_w4a16.passes.binding.pack", "torch._inductor.compile_fx.compile_fx"):
        monkeypatch.setattr(name, None)
    with torch.profiler.profile() as profile:
        assert len(explain(model, X).replaced) == 2
    ran = {event.key for event in profile.key_averages()}
    assert "aten::linear" in ran and not any(name.startswith("marlin_w4a16") for name in ran)
    assert not [r for r in caplog.records if r.name == "marlin_w4a16"]


def test_graph_breaks_are_counted(fp4_linear):
    first, second = fp4_linear(64, 64), fp4_linear(64, 64)

    def broken(x: Tensor) -> Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    report = explain(broken, X)
    assert report.graphs == 2 and len(report.replaced) == 2


def test_a_model_without_fp4_has_no_rows():
    report = explain(nn.Linear(64, 64), X)
    assert not report.rows and report.graphs == 1


def test_it_runs_the_model_once(fp4_linear):
    linear, calls = fp4_linear(), []
    explain(lambda x: calls.append(0) or linear(x), X)
    assert len(calls) == 1
