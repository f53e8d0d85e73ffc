from dataclasses import replace

import pytest

from marlin_w4a16.passes.outcome import Excluded, Owned, Rejected, Replaced, Row
from marlin_w4a16.report.table import collapse, describe, how, size, size_if_any, table

OP = "marlin_w4a16::linear"
TRITON = Replaced(OP, "Triton", 10)


def row(path: str, outcome: Replaced | Owned | Rejected | Excluded = TRITON, **changes) -> Row:
    return replace(Row(path, "F.linear", (96, 64), "NVFP4 group 16", outcome, 7), **changes)


def collapsed(*paths: str) -> list[tuple[str, int]]:
    return [(line.path, len(line.rows)) for line in collapse(row(path) for path in paths)]


def test_rows_of_many_layers_are_one_line():
    assert collapsed(*(f"layers.{i}.{name}" for i in range(12) for name in ("up", "down"))) == [
        ("layers.{0..11}.up", 12),
        ("layers.{0..11}.down", 12),
    ]


def test_missing_numbers_are_told():
    assert collapsed("0.up", "1.up", "2.up", "4.up", "7.up", "8.up") == [("{0..2,4,7..8}.up", 6)]


def test_layers_of_experts_are_one_line():
    assert collapsed(*(f"layers.{i}.experts.{j}.up" for i in range(2) for j in range(3))) == [
        ("layers.{0..1}.experts.{0..2}.up", 6)
    ]


def test_only_a_full_product_is_one_line():
    paths = [f"layers.{i}.experts.{j}.up" for i in range(3) for j in range(4)]
    paths.remove("layers.1.experts.2.up")
    assert collapsed(*paths) == [("layers.{0,2}.experts.{0..3}.up", 8), ("layers.1.experts.{0..1,3}.up", 3)]


@pytest.mark.parametrize(
    "paths",
    [
        ("up", "down"), ("layers.0.up", "layers.1.down"), ("layers.0.up", "blocks.1.up"), ("layer0.up", "layer1.up"),
        ("a.0", "a.1.b"), ("a.01", "a.1"),
    ],
)  # fmt: skip
def test_other_paths_stay_apart(paths):
    assert collapsed(*paths) == [(path, 1) for path in paths]


CHANGES = {
    "outcome": {"outcome": Rejected("it is NF4")}, "kernel": {"outcome": Replaced(OP, "CPU blocks", 10)},
    "packed bytes": {"outcome": Replaced(OP, "Triton", 11)},
    "note": {"outcome": Replaced(OP, "Triton", 10, "rounded twice")}, "owned": {"outcome": Owned(OP, "Triton", 10)},
    "shape": {"shape": (64, 96)}, "format": {"format": None}, "form": {"spelling": "matmul"}, "bytes": {"nbytes": 8},
    "uses": {"uses": 2}, "producer": {"producer": "torchao"},
}  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_rows_that_differ_in_anything_else_stay_apart(changes):
    rows = [row("layers.0.up"), row("layers.1.up", **changes), row("layers.2.up")]
    assert [line.rows for line in collapse(rows)] == [(rows[0], rows[2]), (rows[1],)]


@pytest.mark.parametrize("kind", [Rejected, Excluded])
def test_two_reasons_are_two_lines(kind):
    rows = [row("layers.0.up", kind("it is NF4")), row("layers.1.up", kind("it is NF3"))]
    assert [line.rows for line in collapse(rows)] == [(rows[0],), (rows[1],)]


def test_a_weight_of_two_graphs_is_two_lines():
    rows = [row("layers.0.up"), row("layers.1.up"), row("layers.0.up"), row("layers.1.up"), row("layers.2.up")]
    assert [(line.path, len(line.rows)) for line in collapse(rows)] == [
        ("layers.{0..2}.up", 3),
        ("layers.{0..1}.up", 2),
    ]


def test_every_row_is_in_one_line():
    rows = [row(f"layers.{i % 5}.experts.{i % 7}.up", uses=1 + i % 2) for i in range(60)]
    assert sorted([one for line in collapse(rows) for one in line.rows], key=repr) == sorted(rows, key=repr)


def test_a_line_has_the_sum_of_bytes_and_the_worst_error():
    rows = [row(f"layers.{i}.up", Replaced(OP, "Triton", 2048, "exact here", 10.0**-i), nbytes=1024) for i in (3, 4)]
    (line,) = collapse(rows)
    assert line.cells == (
        "layers.{3..4}.up", "2", "96 x 64", "NVFP4 group 16", "F.linear", "2.0 KiB", "4.0 KiB",
        "replaced: linear (Triton); exact here; worst error 1.0e-03",
    )  # fmt: skip


def test_an_error_of_zero_is_told():
    assert how(row("up", Replaced(OP, "Triton", 1, None, 0.0))) == "linear (Triton); worst error 0.0e+00"


@pytest.mark.parametrize(
    "outcome, end",
    [
        (Replaced(OP, "Triton", 1), "replaced: linear (Triton)"),
        (Owned(OP, "CPU blocks", 1), "owned: linear (CPU blocks)"),
        (Rejected("it is NF4"), "left: it is NF4"),
        (Excluded("named in exclude"), "excluded: named in exclude"),
    ],
)
def test_a_row_as_one_line(outcome, end):
    assert describe(row("up", outcome, uses=3)) == f"up (96 x 64, NVFP4 group 16, F.linear x 3): {end}"
    assert describe(row("up", outcome, format=None)) == f"up (96 x 64, F.linear): {end}"


def test_the_last_column_wraps():
    words = "because " * 20 + "end"
    lines = table([("a", "b", "why"), ("one", "2", words), ("three", "4", "")]).splitlines()
    assert lines[0] == "a      b  why" and lines[-1] == "three  4"
    assert max(map(len, lines)) <= 10 + 64
    assert " ".join(" ".join(lines[1:-1]).split()) == f"one 2 {words}"
    assert all(line.startswith(" " * 10) for line in lines[2:-1]) and len(lines) == 5


def test_sizes():
    found = [size(n) for n in (0, 1536, (1 << 20) - 1, 1 << 20, (1 << 30) - 1, 5 << 28)]
    assert found == ["0.0 KiB", "1.5 KiB", "1024.0 KiB", "1.0 MiB", "1024.0 MiB", "1.25 GiB"]
    assert [size_if_any(n) for n in (0, 1536)] == ["-", "1.5 KiB"]
