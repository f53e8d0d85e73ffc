import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import torch
from documented import check, tables
from rich.console import Console
from torch import Tensor, nn

from marlin_w4a16 import Report, explain, quantize_mxfp4
from marlin_w4a16.passes.outcome import Excluded, Mixture, Owned, Rejected, Replaced, Row
from marlin_w4a16.report.breaks import Break
from marlin_w4a16.report.html import page
from marlin_w4a16.report.table import WORDS

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
OP = "marlin_w4a16::linear"
DOC = Path(__file__).parents[2] / "docs" / "report.md"
SCHEMA = tables("report.md", "JSON, schema 1")


def row(path: str, outcome: Replaced | Owned | Rejected | Excluded, uses: int = 1) -> Row:
    return Row(path, "F.linear", (96, 64), "NVFP4 group 16", outcome, 3456, uses)


@pytest.fixture
def report() -> Report:
    return Report(
        (
            row("layers.0.up", Replaced(OP, "Triton", 3 << 20)),
            row("layers.1.up", Replaced(OP, "Triton", 3 << 20)),
            row("mlp.down", Replaced(OP, "Triton", 1 << 20), uses=2),
            Row("odd", "matmul", (8, 1024), None, Rejected("it is NF4"), 99),
        ),
        graphs=2,
        breaks=(Break("print is no operator", "model.py:3 in forward: print(x)"),),
    )


@pytest.fixture
def every_outcome() -> Report:
    """All values that the JSON can hold, and text that HTML and rich must not read as markup."""
    outcomes = {
        "a<b>&amp;": Replaced(OP, "Triton", 1, "rounded <twice>", 1.5e-3),
        "plain": Replaced(OP, "Triton", 2),
        "owned": Owned(OP, "CPU <blocks>", 3),
        "[bold]left": Rejected("codes [96, 32] <script>alert(1)</script> [/bold] [red]"),
        "excluded": Excluded("named by 'exclude' & more"),
    }
    rows = [row(path, outcome) for path, outcome in outcomes.items()]
    rows[1] = replace(rows[1], producer="ModelOpt", format=None)
    rows[2] = replace(rows[2], experts=Mixture(8, 2, "silu(gate) * up"))
    breaks = (Break("<module> broke", 'm.py:1 in <lambda>: a < b and c > "d"'), Break("limit & more", None))
    return Report(tuple(rows), 2, breaks)


def test_rows_are_told_apart(report, every_outcome):
    assert [r.path for r in report.replaced] == ["layers.0.up", "layers.1.up", "mlp.down"]
    assert [r.path for r in report.rejected] == ["odd"] and [r.path for r in every_outcome.owned] == ["owned"]
    assert [r.path for r in every_outcome.excluded] == ["excluded"]


def test_the_summary_is_one_line(report):
    assert report.summary() == (
        "replaced 3 of 4 FP4 linears (3 NVFP4 group 16; 3 Triton), packed copies of 7.0 MiB beside the originals; "
        "left 1: 1 it is NF4"
    )


def test_the_summary_of_nothing_replaced():
    assert Report((row("odd", Rejected("it is NF4")),)).summary() == "replaced 0 of 1 FP4 linears; left 1: 1 it is NF4"


def test_the_summary_of_nothing():
    assert Report(()).summary() == "replaced 0 of 0 FP4 linears"


def test_the_summary_counts_what_the_options_exclude_apart():
    rows = (row("up", Replaced(OP, "Triton", 0)), *(row(name, Excluded("by name")) for name in "ab"))
    assert Report(rows).summary() == "replaced 1 of 1 FP4 linears (1 NVFP4 group 16; 1 Triton); excluded 2"
    assert Report(rows[1:]).summary() == "excluded 2"


def test_the_summary_names_no_more_than_four_reasons():
    rows = tuple(row("up", Rejected(f"reason {i * (i < 6)}")) for i in range(8))
    line = "replaced 0 of 8 FP4 linears; left 8: 3 reason 0, 1 reason 1, 1 reason 2, 1 reason 3, 2 others"
    assert Report(rows).summary() == line


def test_the_summary_has_the_notes_and_the_worst_error():
    outcomes = [
        Replaced(OP, "Triton", 0, note, error) for note, error in (("odd", 3e-4), ("odd", 1.2e-3), (None, None))
    ]
    rows = tuple(row("up", outcome) for outcome in outcomes)
    assert Report(rows).summary().endswith("(3 NVFP4 group 16; 3 Triton); 2 odd; worst error of verify 1.2e-03")
    assert "worst error" not in Report(rows[2:]).summary()
    assert (
        Report((row("up", Replaced(OP, "Triton", 0, None, 0.0)),)).summary().endswith("worst error of verify 0.0e+00")
    )


def test_stacks_of_experts_are_told_apart():
    experts = Mixture(8, 2, "silu(gate) * up")
    stack = Row(
        "up", "bmm", (8, 96, 64), "NVFP4 group 16", Replaced("marlin_w4a16::moe", "Triton", 0), 9, 1, None, experts
    )
    alone = replace(
        stack, experts=None, outcome=Replaced("marlin_w4a16::grouped_linear", "Triton", 0, "no whole mixture")
    )
    left = replace(alone, outcome=Rejected("it is NF4"))
    report = Report((row("up", Replaced(OP, "Triton", 0)), stack, stack, alone, left))
    assert report.summary() == (
        "replaced 1 of 1 FP4 linears (1 NVFP4 group 16; 1 Triton) and 3 of 4 stacks of FP4 matrices (3 NVFP4 group 16; "
        "3 Triton; 2 in whole mixtures: 2 of 8 experts, silu(gate) * up); 1 no whole mixture; left 1: 1 it is NF4"
    )
    assert "8 x 96 x 64" in str(report) and "moe (Triton), 2 of 8 experts, silu(gate) * up" in str(report)
    assert report.totals()["bf16_bytes"] == 2 * 96 * 64 * (1 + 4 * 8)
    owned = Report((replace(stack, outcome=Owned("marlin_w4a16::moe", "Triton", 1024)),))
    assert owned.summary().startswith("1 packed stacks of experts (1 NVFP4 group 16; 1 Triton; 1 in whole mixtures")


def test_small_copies_are_counted_in_kibibytes():
    assert "packed copies of 1.5 KiB" in Report((row("up", Replaced(OP, "Triton", 1536)),)).summary()


def test_the_table(report):
    assert str(report).splitlines() == [
        "weight            n  shape     format          product       bytes    packed   outcome",
        "layers.{0..1}.up  2  96 x 64   NVFP4 group 16  F.linear      6.8 KiB  6.0 MiB  replaced: linear (Triton)",
        "mlp.down          1  96 x 64   NVFP4 group 16  F.linear x 2  3.4 KiB  1.0 MiB  replaced: linear (Triton)",
        "odd               1  8 x 1024  -               matmul        0.1 KiB  -        left: it is NF4",
        "graph break: print is no operator",
        "  at model.py:3 in forward: print(x)",
        "4 weights in 2 graphs: 3 replaced, 1 left, 10.2 KiB original, 7.0 MiB packed, 52.0 KiB as bfloat16",
    ]


def test_the_table_of_nothing():
    assert str(Report(())) == "no product of 1 graph has a weight made from FP4 codes"


def test_the_total_line_leaves_out_what_is_zero():
    owned = Report((replace(row("up", Owned(OP, "Triton", 1 << 20)), nbytes=0),))
    assert owned.total_line() == "1 weight in 1 graph: 1 owned, 1.0 MiB packed, 12.0 KiB as bfloat16"


def rich_text(report: Report, width: int, colours: bool = False) -> str:
    console = Console(
        file=StringIO(), width=width, force_terminal=colours, color_system="standard" if colours else None
    )
    console.print(report)
    return console.file.getvalue()


def test_rich_shows_what_print_shows(every_outcome):
    plain, shown = str(every_outcome).split(), rich_text(every_outcome, 240).split()
    assert [word for word in shown if set(word) != {"─"}] == plain


def test_rich_loses_no_letter_in_a_narrow_terminal(report):
    shown = rich_text(report, 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert all(word in shown for word in ("weight", "replaced:", "(Triton)", "left:", "NF4", "1.0 MiB"))
    assert "layers.{0..1}.upmlp.down" in "".join(re.findall(r"^ (\S+)", shown, re.M))


def test_rich_colours_the_outcome_alone(every_outcome):
    shown = rich_text(every_outcome, 240, colours=True)
    words = re.findall(r"\x1b\[([0-9;]+)m(replaced|owned|left|excluded)\x1b\[0m:", shown)
    assert len(words) == 5 and len(set(words)) == 4 and len({style for style, _ in words}) == 4


class Elements(HTMLParser):
    """Checks that elements are closed in order, and keeps the text of cells and the tags."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("td", "th", "li", "dd"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th", "li", "dd"} & set(self.open):
            self.cells[-1] += data


def test_html_has_every_row_and_reads_no_text_as_markup(every_outcome):
    rows, elements = every_outcome.rows, Elements(every_outcome._repr_html_())
    assert elements.tags.count("tr") == 1 + 5 and "script" not in elements.tags and "b" not in elements.tags
    first = elements.cells.index("How or why") + 1
    cells = iter(elements.cells[first:-2])
    common = ("96 x 64", "NVFP4 group 16", "F.linear", "3.4 KiB")
    assert list(zip(*[cells] * 8, strict=True)) == [
        (rows[0].path, *common, "0.0 KiB", "replaced", "linear (Triton); rounded <twice>; worst error 1.5e-03"),
        ("plain", "96 x 64", "-", *common[2:], "0.0 KiB", "replaced", "linear (Triton)"),
        ("owned", *common, "0.0 KiB", "owned", "linear (CPU <blocks>), 2 of 8 experts, silu(gate) * up"),
        ("[bold]left", *common, "-", "left", rows[3].outcome.reason),
        ("excluded", *common, "-", "excluded", "named by 'exclude' & more"),
    ]
    assert elements.cells[-2:] == ['<module> brokem.py:1 in <lambda>: a < b and c > "d"', "limit & more"]


def test_html_does_not_collapse(report):
    text = report._repr_html_()
    assert "<code>layers.0.up</code>" in text and "<code>layers.1.up</code>" in text


def test_html_of_nothing_has_no_table():
    text = Report(())._repr_html_()
    assert "no product of 1 graph has a weight made from FP4 codes" in text
    assert not {"table", "dl", "ol"} & set(Elements(text).tags)


def test_html_styles_every_outcome_on_light_and_dark_screens():
    light, dark = Report(())._repr_html_().split("@media (prefers-color-scheme: dark)")
    for word in WORDS.values():
        assert f"--{word}: #" in light and f"--{word}: #" in dark and f".mw4 .{word} {{ color: var(--{word})" in dark


def test_a_page_is_a_whole_document_that_loads_nothing(every_outcome):
    text = page(every_outcome)
    assert text.startswith('<!doctype html><html lang="en"><head><meta charset="utf-8">')
    assert {"html", "head", "title", "body", "table"} <= set(Elements(text).tags)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|http", text)
    assert every_outcome._repr_html_() in text


def test_json_is_as_documented(every_outcome, report):
    assert set(SCHEMA) == {"Report", "Versions", "Break", "Totals", "Weight", "Experts"}
    for one in (every_outcome, report, Report(())):
        check(json.loads(one.to_json()), "Report", SCHEMA)


def test_every_nullable_key_is_tried_with_and_without_a_value(every_outcome):
    for name, key in (("Weight", "weights"), ("Break", "breaks")):
        found = json.loads(every_outcome.to_json())[key]
        for field, kind in SCHEMA[name].items():
            values = [item[field] for item in found]
            assert (None in values) == kind.endswith(" or null"), field
            assert any(value is not None for value in values), field


def test_the_documented_example_is_of_the_schema():
    check(json.loads(DOC.read_text().partition("```json\n")[2].partition("```")[0]), "Report", SCHEMA)


def test_the_documented_outcomes_are_all():
    table = DOC.read_text().partition("| outcome | meaning |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) == list(WORDS.values())


def test_json_has_what_the_rows_have(every_outcome):
    found = json.loads(every_outcome.to_json())
    assert found["schema"] == 1 and found["graphs"] == 2 and found["versions"]["torch"] == torch.__version__
    assert found["breaks"][1] == {"reason": "limit & more", "where": None}
    assert found["totals"] == {
        **{"weights": 5, "replaced": 2, "owned": 1, "left": 1, "excluded": 1},
        **{"bytes": 5 * 3456, "packed_bytes": 6, "bf16_bytes": 5 * 96 * 64 * 2},
    }
    assert found["weights"][0] == {
        **{"path": "a<b>&amp;", "form": "F.linear", "shape": [96, 64], "matrices": 1},
        **{
            "format": "NVFP4 group 16",
            "group": 16,
            "outcome": "replaced",
            "experts": None,
            "op": OP,
            "kernel": "Triton",
            "reason": None,
        },
        **{"note": "rounded <twice>", "error": 1.5e-3},
        **{"bytes": 3456, "packed_bytes": 1, "uses": 1, "producer": None},
    }
    assert [w["outcome"] for w in found["weights"]] == ["replaced", "replaced", "owned", "left", "excluded"]
    assert [w["packed_bytes"] for w in found["weights"]] == [1, 2, 3, None, None]
    assert [w["reason"] is None for w in found["weights"]] == [True, True, True, False, False]


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
    assert report.graphs == 1 and not report.breaks
    found = [(r.path, r.shape, r.format, r.uses, type(r.outcome)) for r in report.rows]
    assert found == [
        ("first.codes", (64, 64), "NVFP4 group 16", 2, Replaced),
        ("second.codes", (32, 64), "MXFP4 group 32", 1, Replaced),
        ("third.codes", (32, 32), None, 1, Rejected),
    ]
    line = report.summary()
    assert line.startswith("replaced 2 of 3 FP4 linears (1 NVFP4 group 16, 1 MXFP4 group 32; 2 CPU blocks)")
    assert line.endswith(f"; left 1: 1 {report.rejected[0].outcome.reason}")


def test_its_json_is_as_documented(model):
    check(json.loads(explain(model, X).to_json()), "Report", SCHEMA)


def test_bytes_before_are_those_of_the_tensors_of_a_weight(model):
    linear = model.second
    tensors = (linear.codes, linear.scales, linear.factor, linear.table)
    assert explain(model, X).rows[1].nbytes == sum(t.nbytes for t in tensors)


def test_it_packs_and_compiles_nothing(model, monkeypatch, caplog):
    caplog.set_level("DEBUG", "marlin_w4a16")
    for name in ("marlin_w4a16.passes.live.binding.pack_stack", "torch._inductor.compile_fx.compile_fx"):
        monkeypatch.setattr(name, None)
    with torch.profiler.profile() as profile:
        assert len(explain(model, X).replaced) == 2
    ran = {event.key for event in profile.key_averages()}
    assert "aten::linear" in ran and not any(name.startswith("marlin_w4a16") for name in ran)
    assert not [r for r in caplog.records if r.name == "marlin_w4a16"]


def test_graph_breaks_are_counted_and_listed(fp4_linear):
    first, second = fp4_linear(64, 64), fp4_linear(64, 64)

    def broken(x: Tensor) -> Tensor:
        x = first(x)
        torch._dynamo.graph_break()
        return second(x)

    report = explain(broken, X)
    assert report.graphs == 2 and len(report.replaced) == 2
    (found,) = report.breaks
    assert found.where.endswith("in broken: torch._dynamo.graph_break()")


def test_a_model_without_fp4_has_no_rows():
    report = explain(nn.Linear(64, 64), X)
    assert not report.rows and report.graphs == 1


def test_it_runs_the_model_once(fp4_linear):
    linear, calls = fp4_linear(), []
    explain(lambda x: calls.append(0) or linear(x), X)
    assert len(calls) == 1


def test_it_takes_the_options_of_the_backend(fp4_linear):
    assert explain(fp4_linear(), X, options={"linear": True}).replaced
    with pytest.raises(ValueError, match=r"unknown option 'linaer'. Did you mean 'linear'"):
        explain(fp4_linear(), X, options={"linaer": True})
