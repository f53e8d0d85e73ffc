"""Tables of the commands on stdout, and words on stderr about what is going on."""

import sys
from collections.abc import Callable, Collection, Sequence
from importlib import util
from typing import Any

from marlin_w4a16.report.table import table

Cells = tuple[str, ...]


def show_table(
    columns: Cells, lines: Sequence[Cells], right: Collection[str] = (), style: Callable[[Cells], str] = lambda _: ""
) -> None:
    """Prints a table: by rich in a terminal, where it is installed, else as plain text.

    Args:
        columns: their names.
        lines: cells, as many as there are columns.
        right: columns of numbers.
        style: rich's name for how the last cell of a line looks.
    """
    if sys.stdout.isatty() and util.find_spec("rich"):
        from rich import print as show

        show(rich_table(columns, lines, right, style))
    else:
        print(table([columns, *lines]))


def rich_table(
    columns: Cells, lines: Sequence[Cells], right: Collection[str] = (), style: Callable[[Cells], str] = lambda _: ""
) -> Any:
    """What `show_table` prints by rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for name in columns:
        shown.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for line in lines:
        *cells, last = line
        shown.add_row(*map(Text, cells), Text(last, style(line)))
    return shown


def tell(text: str) -> None:
    """A line on stderr, dim where rich is installed."""
    if sys.stderr.isatty() and util.find_spec("rich"):
        from rich.console import Console

        Console(stderr=True).print(text, style="dim", highlight=False, markup=False)
    else:
        print(text, file=sys.stderr, flush=True)
