"""A report in a terminal with colours, by rich."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from marlin_w4a16.report.table import COLUMNS, collapse

if TYPE_CHECKING:
    from marlin_w4a16.report.data import Report

_STYLES = {"replaced": "green", "owned": "cyan", "left": "yellow", "excluded": "dim"}
_RIGHT = {"n", "shape", "bytes", "packed"}


def rich_table(
    columns: Sequence[str],
    lines: Iterable[Sequence[Any]],
    right: Collection[str] = (),
    style: Callable[[Any], str] = lambda _: "",
    styled: int = -1,
) -> Any:
    """A table of rich.

    Args:
        columns: their names.
        lines: cells, as many as there are columns, each a string or a Text of rich.
        right: columns of numbers.
        style: rich's name for how one cell of a line looks.
        styled: which one that is.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in columns:
        shown.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for line in lines:
        texts = [Text(cell) if isinstance(cell, str) else cell for cell in line]
        texts[styled].style = style(line) or texts[styled].style
        shown.add_row(*texts)
    return shown


def rich_report(report: "Report") -> Any:
    """What ``rich.print`` shows: as ``str(report)``, with the outcome in colour and long cells wrapped to fit."""
    from rich.console import Group
    from rich.text import Text

    lines = []
    for line in collapse(report.rows):
        *cells, outcome = line.cells
        word = outcome.partition(":")[0]
        lines.append((*cells, Text.assemble((word, _STYLES[word]), outcome.removeprefix(word))))
    table = rich_table(COLUMNS, lines, _RIGHT)
    breaks = [Text.assemble(("graph break: ", "bold"), str(cause)) for cause in report.breaks]
    return Group(*([table] if report.rows else []), *breaks, Text(report.total_line(), "bold"))
