"""What is wrong with a checkpoint, for people: equal problems of many tensors are one line."""

from collections.abc import Iterator, Sequence

from marlin_w4a16.checkpoints.layers import Problem
from marlin_w4a16.report.table import collapse_paths

_MOST = 20


def told(name: str, problems: Sequence[Problem]) -> str:
    """The message of an error."""
    lines = list(problem_lines(problems))
    more = [f"and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join([f"{name} cannot be loaded:", *(f"  {line}" for line in [*lines[:_MOST], *more])])


def problem_lines(problems: Sequence[Problem]) -> Iterator[str]:
    """Problems that differ in the numbers of their tensors and in the file only as one, with a count."""
    for tensor, places in collapse_paths((one.tensor, (one.found, one.expected)) for one in problems):
        files = {problems[place].file for place in places}
        first = problems[places[0]]
        line = str(Problem(first.file if len(files) == 1 else None, tensor, first.found, first.expected))
        yield f"{line} ({len(places)} times)" if len(places) > 1 else line
