"""Says what FP4 weights a checkpoint holds: what becomes of each when it is loaded, what it takes, what is wrong.

Only configs and headers are read, which takes seconds for hundreds of gigabytes; no GPU is touched. Equal linears of
many layers stand as one line.
"""

import argparse
import json
from dataclasses import asdict
from typing import Any

from marlin_w4a16.checkpoints import registry
from marlin_w4a16.cli.gguf_inspection import inspect_gguf
from marlin_w4a16.cli.inspection import Inspection, Line, Outcome, inspect, local
from marlin_w4a16.cli.show import Cells, show_table
from marlin_w4a16.report.data import Report
from marlin_w4a16.report.problems import problem_lines
from marlin_w4a16.report.table import size, size_if_any

SCHEMA = 1
_COLUMNS = ("weight", "n", "shape", "format", "in files", "loaded", "as bfloat16", "outcome")
_RIGHT = {"n", "shape", "in files", "loaded", "as bfloat16"}
_WORDS: dict[Outcome, str] = {
    "packed": "packed",
    "decoded": "dense, decoded from FP8",
    "dense": "dense",
    "unused": "not loaded",
    "left": "left to transformers",
    "refused": "cannot be loaded",
}
_STYLES = {"packed": "green", "cannot be loaded": "bold red", "left to transformers": "yellow", "dense": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and whether values are read."""
    parser.add_argument("path", help="folder of a checkpoint: its config.json and safetensors files; or a GGUF file")
    parser.add_argument("--values", action="store_true", help="read the scales too, and look for NaN and infinity")


def run(args: argparse.Namespace) -> int:
    """Prints what a checkpoint is; 1 if it cannot be loaded."""
    path = local(args.path)
    found = (inspect_gguf if path.is_file() else inspect)(path, args.values)
    if args.json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        print(headline(found))
        lines = [*map(cells, found.lines)]
        show_table(_COLUMNS, lines, right=_RIGHT, style=lambda line: _STYLES.get(line[-1].split(":")[0], ""))
        print(*summary(found), sep="\n")
    return 1 if found.problems else 0


def as_dict(found: Inspection) -> dict[str, Any]:
    """For JSON, by the schema in docs/commands.md."""
    return {
        "schema": SCHEMA,
        "versions": Report.versions(),
        "folder": str(found.folder),
        **{name: getattr(found, name) for name in ("config", "producer", "algorithm", "files", "tensors")},
        "formats": dict(found.formats),
        "totals": found.totals,
        "weights": [asdict(line) for line in found.lines],
        "notes": list(found.notes),
        "problems": [asdict(problem) for problem in found.problems],
    }


def headline(found: Inspection) -> str:
    """Whose checkpoint it is, and how big."""
    what = " ".join(filter(None, (found.producer, found.algorithm))) or "no quantisation config"
    where = f" (by {found.config})" if found.config else ""
    files = f"{found.files} file{'s' if found.files != 1 else ''}"
    return f"{found.folder}: {what}{where}, {found.tensors} tensors in {files}"


def cells(line: Line) -> Cells:
    """What `_COLUMNS` name."""
    word = _WORDS[line.outcome]
    return (
        line.path,
        str(line.count),
        "-" if line.shape is None else " x ".join(map(str, line.shape)) or "1",
        line.format,
        *map(size_if_any, (line.bytes, line.loaded_bytes, line.bf16_bytes)),
        word if line.reason is None else f"{word}: {line.reason}",
    )


def summary(found: Inspection) -> list[str]:
    """What stands under the table: sums, what is not FP4, notes, every problem."""
    totals = found.totals
    linears = ", ".join(f"{count} {name}" for name, count in found.formats.items())
    sizes = f"{size(totals['bytes'])} in files"
    if not found.problems:
        sizes += f", {size(totals['loaded_bytes'])} loaded, {size(totals['bf16_bytes'])} as bfloat16"
    lines = [f"{totals['fp4_linears']} FP4 linears{f' ({linears})' if linears else ''}; {sizes}"]
    if not linears and not found.problems:
        lines.append(_not_fp4(found))
    lines += [f"note: {note}" for note in found.notes]
    if found.problems:
        lines += [f"problem: {text}" for text in problem_lines(found.problems)]
        lines.append(f"it cannot be loaded: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}")
    return lines


def _not_fp4(found: Inspection) -> str:
    if found.config is None:
        return "nothing here is FP4: there is no quantisation config, every tensor is dense"
    if found.layers:
        return "nothing here is FP4"
    if any(line.outcome == "left" for line in found.lines):
        *known, last = (row.producer for row in registry.FORMATS)
        return f"nothing here is FP4 of {', '.join(known)} or {last}: {found.producer} is left to transformers"
    return "nothing here is FP4: no tensor is quantised"
