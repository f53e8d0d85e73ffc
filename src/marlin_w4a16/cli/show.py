"""Tables of the commands on stdout, and words on stderr about what is going on."""

import sys
from collections.abc import Sequence
from importlib import util
from typing import Any

from marlin_w4a16.report.table import table
from marlin_w4a16.report.terminal import rich_table

Cells = tuple[str, ...]


def show_table(columns: Cells, lines: Sequence[Cells], **look: Any) -> None:
    """Prints a table: by rich in a terminal, where it is installed, with a look as in `rich_table`, else as text."""
    if sys.stdout is not None and sys.stdout.isatty() and util.find_spec("rich"):
        from rich import print as show

        show(rich_table(columns, lines, **look))
    else:
        print(table([columns, *lines]))


def tell(text: str) -> None:
    """A line on stderr, dim where rich is installed."""
    if sys.stderr is not None and sys.stderr.isatty() and util.find_spec("rich"):
        from rich.console import Console

        Console(stderr=True).print(text, style="dim", highlight=False, markup=False)
    else:
        print(text, file=sys.stderr, flush=True)
