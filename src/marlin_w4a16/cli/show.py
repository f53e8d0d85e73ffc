"""Tables of the commands on stdout, and words on stderr about what is going on."""

import sys
from collections.abc import Callable, Collection, Sequence
from importlib import util

from marlin_w4a16.report.table import table
from marlin_w4a16.report.terminal import rich_table

Cells = tuple[str, ...]


def show_table(
    columns: Cells,
    lines: Sequence[Cells],
    right: Collection[str] = (),
    style: Callable[[Cells], str] = lambda _: "",
    styled: int = -1,
) -> None:
    """Prints a table: by rich in a terminal, where it is installed, else as plain text; see `rich_table`."""
    if sys.stdout.isatty() and util.find_spec("rich"):
        from rich import print as show

        show(rich_table(columns, lines, right, style, styled))
    else:
        print(table([columns, *lines]))


def tell(text: str) -> None:
    """A line on stderr, dim where rich is installed."""
    if sys.stderr.isatty() and util.find_spec("rich"):
        from rich.console import Console

        Console(stderr=True).print(text, style="dim", highlight=False, markup=False)
    else:
        print(text, file=sys.stderr, flush=True)
