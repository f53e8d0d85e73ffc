"""A report in a terminal with colours, by rich."""

from typing import TYPE_CHECKING, Any

from marlin_w4a16.report.table import COLUMNS, collapse

if TYPE_CHECKING:
    from marlin_w4a16.report.data import Report

_STYLES = {"replaced": "green", "owned": "cyan", "left": "yellow", "excluded": "dim"}
_RIGHT = {"n", "shape", "bytes", "packed"}


def rich_report(report: "Report") -> Any:
    """What ``rich.print`` shows: as ``str(report)``, with the outcome in colour and long cells wrapped to fit."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in COLUMNS:
        justify: Any = "right" if name in _RIGHT else "left"
        table.add_column(name, justify=justify, overflow="fold")
    for line in collapse(report.rows):
        *cells, outcome = line.cells
        word = outcome.partition(":")[0]
        table.add_row(*map(Text, cells), Text.assemble((word, _STYLES[word]), outcome.removeprefix(word)))
    breaks = [Text.assemble(("graph break: ", "bold"), str(cause)) for cause in report.breaks]
    return Group(*([table] if report.rows else []), *breaks, Text(report.total_line(), "bold"))
