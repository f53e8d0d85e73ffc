import ast
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import depyf
import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import Report, debug
from marlin_w4a16.passes.outcome import Rejected, Replaced, Row
from marlin_w4a16.report.breaks import Break
from marlin_w4a16.report.debug import publish
from scripts import LAYER

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
OP = "torch.ops.marlin_w4a16.linear.default"
GRAPH = torch.fx.symbolic_trace(nn.ReLU())
REPORT = Report((Row("up", "F.linear", (96, 64), None, Rejected("it is NF4"), 7),))

pytestmark = pytest.mark.filterwarnings("ignore:.*You are trying to debug")


@pytest.fixture
def names(tmp_path: Path):
    """The names of this project's files in a folder."""
    return lambda folder=tmp_path: sorted(f.name for f in folder.iterdir() if f.name.startswith(("graph_", "report")))


@pytest.fixture
def broken(fp4_linear) -> nn.Module:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.left, self.dense = fp4_linear(64, 64), fp4_linear(64, 64), nn.Linear(64, 64)
            self.left.table[5] = 2.9

        def forward(self, x: Tensor) -> Tensor:
            x = self.left(self.up(x))
            torch._dynamo.graph_break()
            return self.dense(x)

    return Model()


def test_each_graph_is_written_before_and_after_and_all_rows_at_the_end(broken, tmp_path, names, assert_near, caplog):
    caplog.set_level("DEBUG", "marlin_w4a16")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="depyf|nothing was compiled")
        with debug(tmp_path / "new" / "folder"):
            assert_near(torch.compile(broken, backend="marlin_w4a16")(X), broken(X))
    folder = tmp_path / "new" / "folder"
    assert names(folder) == ["graph_0_after.py", "graph_0_before.py", "graph_1_before.py", "report.html", "report.json"]
    before, after = ((folder / f"graph_0_{when}.py").read_text() for when in ("before", "after"))
    for code in (before, after, (folder / "graph_1_before.py").read_text()):
        assert [type(node) for node in ast.parse(code).body] == [ast.ClassDef]
        assert re.search(r'L_x_: "f32\[3, 64\]"|stack\d*: "f32|x: "f32', code, re.I) and "# File: " in code
    assert OP not in before and after.count(OP) == 1
    assert before.startswith("# Graph 0: as Dynamo traced it\n")
    assert after.startswith("# Graph 0: replaced 1 of 2 FP4 linears")
    assert re.search(r'up_parameters_codes__words_\d+: "i32\[', after)
    found = json.loads((folder / "report.json").read_text())
    assert found["graphs"] == 2 and [w["outcome"] for w in found["weights"]] == ["replaced", "left"]
    (cause,) = found["breaks"]
    assert cause["where"].endswith("in forward: torch._dynamo.graph_break()")
    (logged,) = (r.message for r in caplog.records if r.message.startswith("graph break: "))
    assert logged == f"graph break: {cause['reason']}\n  at {cause['where']}"
    page = (folder / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "<code>up.codes</code>" in page and "in 2 graphs" not in page
    assert list(folder.glob("full_code_for_forward_*.py"))


def hidden(x: Tensor) -> Tensor:
    x = x.sin().cos()
    try:
        print("one")
    finally:
        x = x + 1
    return x


def also_hidden(x: Tensor) -> Tensor:
    x = x.sin().cos()
    try:
        open(os.devnull).close()
    finally:
        x = x + 1
    return x


def test_breaks_are_collected_graph_by_graph(tmp_path):
    """Which of two refusals belongs to which break can only be told between them."""

    def backend(gm, _):
        publish(Report(()), gm, None)
        return gm.forward

    with debug(tmp_path):
        for function in (hidden, also_hidden):
            torch.compile(function, backend=backend)(X)
    reasons = [one["reason"] for one in json.loads((tmp_path / "report.json").read_text())["breaks"]]
    assert [re.search("operator `(.*?)`", reason)[1] for reason in reasons] == ["print", "open"]


def test_nothing_is_written_once_it_has_ended(broken, tmp_path, names):
    with debug(str(tmp_path)):
        publish(REPORT, GRAPH, None)
    written = names()
    assert written == ["graph_0_before.py", "report.html", "report.json"]
    publish(REPORT, GRAPH, GRAPH)
    assert names() == written


def test_what_there_is_is_written_when_the_code_inside_raises(tmp_path, names, recwarn):
    with pytest.raises(KeyError, match="mine"), debug(tmp_path):
        publish(REPORT, GRAPH, GRAPH)
        raise KeyError("mine")
    assert names() == ["graph_0_after.py", "graph_0_before.py", "report.html", "report.json"]
    assert [w["path"] for w in json.loads((tmp_path / "report.json").read_text())["weights"]] == ["up"]
    with pytest.raises(KeyError, match="at once"), debug(tmp_path):
        raise KeyError("at once")
    assert not [w for w in recwarn if "nothing was compiled" in str(w.message)]


def test_a_folder_is_written_to_again(tmp_path):
    for path in ("first", "second"):
        with debug(tmp_path):
            publish(Report((Row(path, "F.linear", (96, 64), None, Rejected("it is NF4"), 7),)), GRAPH, None)
        assert [w["path"] for w in json.loads((tmp_path / "report.json").read_text())["weights"]] == [path]


def test_nothing_compiled_is_a_warning_at_the_users_line(fp4_linear, tmp_path, names):
    compiled = torch.compile(fp4_linear(), backend="marlin_w4a16")
    with pytest.warns(UserWarning, match=r"nothing was compiled inside debug\(\)") as caught, debug(tmp_path):
        pass
    assert [w.filename for w in caught if "nothing" in str(w.message)] == [__file__]
    assert names() == ["report.html", "report.json"]
    compiled(X)
    assert names() == ["report.html", "report.json"]


def test_one_session_at_a_time(tmp_path, names):
    with debug(tmp_path / "outer"):
        with pytest.raises(RuntimeError, match=r"debug\(\) is active already"), debug(tmp_path / "inner"):
            pass
        publish(REPORT, GRAPH, None)
    assert "graph_0_before.py" in names(tmp_path / "outer")
    with debug(tmp_path / "later"):
        publish(REPORT, GRAPH, None)
    assert "graph_0_before.py" in names(tmp_path / "later")


def test_other_threads_are_not_written(tmp_path, names):
    with debug(tmp_path):
        publish(REPORT, GRAPH, None)
        thread = threading.Thread(target=publish, args=(REPORT, GRAPH, None))
        thread.start()
        thread.join()
    assert names() == ["graph_0_before.py", "report.html", "report.json"]


def test_without_depyf_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "depyf", None)
    message = r"debug\(\) needs depyf: pip install 'marlin_w4a16\[debug\]'"
    with pytest.raises(ImportError, match=message), debug(tmp_path / "folder"):
        pass
    assert not (tmp_path / "folder").exists()


def test_what_depyf_cannot_write_is_a_warning(tmp_path, names, monkeypatch):
    @contextmanager
    def prepare_debug(folder):
        yield
        raise AttributeError("no co_name")

    monkeypatch.setattr(depyf, "prepare_debug", prepare_debug)
    for _ in range(2):
        message = "depyf could not write all of its files: AttributeError: no co_name"
        with pytest.warns(UserWarning, match=message), debug(tmp_path):
            publish(REPORT, GRAPH, None)
    assert names() == ["graph_0_before.py", "report.html", "report.json"]


def test_a_graph_is_told_to_the_logger_row_by_row(caplog):
    rows = (*REPORT.rows, Row("down", "matmul", (8, 64), "NVFP4 group 16", Replaced("a::linear", "Triton", 1), 7, 2))
    report = Report(rows, breaks=(Break("print", "model.py:3"),))
    for level in ("INFO", "DEBUG"):
        caplog.set_level(level, "marlin_w4a16")
        publish(report, GRAPH, None)
    assert [(r.levelname, r.message) for r in caplog.records if r.name == "marlin_w4a16"] == [
        ("DEBUG", "up (96 x 64, F.linear): left: it is NF4"),
        ("DEBUG", "down (8 x 64, NVFP4 group 16, matmul x 2): replaced: linear (Triton)"),
        ("DEBUG", "graph break: print\n  at model.py:3"),
    ]


SCRIPT = """
import {first}, {second}
{layer}
import marlin_w4a16.backend
marlin_w4a16.backend.compile_graph = lambda gm, *_: gm.forward
{then}
torch.compile(nn.Sequential(Layer()), backend="marlin_w4a16")(torch.ones(3, 64))
"""


def run(folder: Path, then: str, order: tuple[str, str], **environment: str) -> str:
    """What a fresh process of that environment writes to stderr."""
    code = SCRIPT.format(layer=LAYER, first=order[0], second=order[1], then=then)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torch_logs_and_torch_trace_have_every_row(tmp_path):
    settings = {"TORCH_LOGS": "+marlin_w4a16", "TORCH_TRACE": str(tmp_path / "trace")}
    stderr = run(tmp_path, "", ("torch", "marlin_w4a16"), **settings)
    assert stderr.count("0.codes (48 x 64, MXFP4 group 32, F.linear): replaced: linear (CPU blocks)") == 1
    assert stderr.count("replaced 1 of 1 FP4 linears") == 1

    (log,) = (tmp_path / "trace").glob("*.log")
    lines = log.read_text().splitlines()
    (at,) = (i for i, line in enumerate(lines) if '"name": "marlin_w4a16_report"' in line)
    metadata = json.loads(lines[at].partition("] ")[2])
    assert metadata["artifact"] == {"name": "marlin_w4a16_report", "encoding": "json"} and metadata["frame_id"] == 0
    end = next(i for i, line in enumerate(lines[at + 1 :], at + 1) if not line.startswith("\t"))
    payload = json.loads("\n".join(line[1:] for line in lines[at + 1 : end]))
    assert payload["schema"] == 1 and [w["path"] for w in payload["weights"]] == ["0.codes"]


def test_without_a_plus_only_the_summary_is_logged_and_without_a_trace_no_json_is_made(tmp_path):
    then = "marlin_w4a16.Report.to_json = lambda self: 1 / 0"
    stderr = run(tmp_path, then, ("marlin_w4a16", "torch"), TORCH_LOGS="marlin_w4a16")
    assert "0.codes" not in stderr and stderr.count("replaced 1 of 1 FP4 linears") == 1
