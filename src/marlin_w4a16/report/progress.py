"""A progress bar, where there is someone to look at it."""

import operator
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, show: bool | None = None) -> Iterator[T]:
    """The items, with a bar of rich on stderr that counts those done.

    Without rich, which is no runtime dependency, there is no bar. No item is held back once the next one is asked for.

    Args:
        items: what to go through.
        description: what stands before the bar.
        show: True for a bar, False for none, None for one if stderr is a terminal.
    """
    if show is False or (show is None and not (sys.stderr and sys.stderr.isatty())):
        return iter(items)
    try:
        import rich.progress  # noqa: F401
    except ImportError:
        return iter(items)
    return _with_bar(items, description)


def _with_bar(items: Iterable[T], description: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task(description, total=operator.length_hint(items) or None)
        for item in items:
            yield item
            del item
            bar.advance(task)
