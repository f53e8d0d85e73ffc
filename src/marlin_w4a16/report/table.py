"""Reports as text: words for outcomes, sizes, columns, and one line for equal rows of many layers."""

import re
import textwrap
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from marlin_w4a16.passes.outcome import Excluded, Owned, Rejected, Replaced, Row

WORDS = {Replaced: "replaced", Owned: "owned", Rejected: "left", Excluded: "excluded"}
COLUMNS = ("weight", "n", "shape", "format", "product", "bytes", "packed", "outcome")
_NUMBER = re.compile(r"(?<![^.\[])(?:0|[1-9]\d*)(?![^.\]])")  # a whole part of a path
_WIDTH = 64


@dataclass(frozen=True, slots=True)
class EqualRows:
    """Rows that are told as one line: they differ in the numbers of their paths, and in the error found, only.

    Attributes:
        path: all their paths, such as ``layers.{0..31}.mlp.up_proj``.
        rows: the rows, at least one.
    """

    path: str
    rows: tuple[Row, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """What `COLUMNS` name."""
        row = self.rows[0]
        return (
            self.path,
            str(len(self.rows)),
            shape(row),
            row.format or "-",
            product(row),
            size_if_any(sum(r.nbytes for r in self.rows)),
            size_if_any(sum(map(packed_bytes, self.rows))),
            f"{word(row)}: {how(*self.rows)}",
        )


def word(row: Row) -> str:
    """What became of a weight: ``replaced``, ``owned``, ``left`` or ``excluded``."""
    return WORDS[type(row.outcome)]


def how(*rows: Row) -> str:
    """By what weights that are equal but for their errors were replaced, or why they were not."""
    outcome = rows[0].outcome
    if isinstance(outcome, Rejected | Excluded):
        return outcome.reason
    text = f"{outcome.op.rpartition('::')[2]} ({outcome.kernel})"
    if rows[0].experts is not None:
        text += f", {rows[0].experts}"
    if isinstance(outcome, Replaced) and outcome.note:
        text += f"; {outcome.told}"
    errors = [row.outcome.error for row in rows if isinstance(row.outcome, Replaced) and row.outcome.error is not None]
    return f"{text}; worst error {max(errors):.1e}" if errors else text


def shape(row: Row) -> str:
    """Rows and columns of a weight; before them, of a stack, the number of its matrices."""
    return " x ".join(map(str, row.shape))


def product(row: Row) -> str:
    """How the model multiplies by a weight, and how often."""
    return row.spelling if row.uses == 1 else f"{row.spelling} x {row.uses}"


def describe(row: Row) -> str:
    """A row as one line."""
    facts = ", ".join(filter(None, (shape(row), row.format, product(row))))
    return f"{row.path} ({facts}): {word(row)}: {how(row)}"


def packed_bytes(row: Row) -> int:
    """Bytes of the packed weight; 0 where there is none."""
    return 0 if isinstance(row.outcome, Rejected | Excluded) else row.outcome.nbytes


def collapse(rows: Iterable[Row]) -> list[EqualRows]:
    """One line for rows that are equal but for numbers in their paths, if those numbers make a full product."""
    held = list(rows)
    groups = collapse_paths((row.path, _look(row)) for row in held)
    return [EqualRows(path, tuple(held[place] for place in places)) for path, places in groups]


def collapse_paths(items: Iterable[tuple[str, Hashable]]) -> list[tuple[str, tuple[int, ...]]]:
    """Paths that differ in numbers only as one, where what stands beside them is equal; with the places of each."""
    copies: Counter[tuple[str, Hashable]] = Counter()
    runs = []
    for place, item in enumerate(items):
        path, look = item
        runs.append(_Run(path, look, copies[item], (place,)))
        copies[item] += 1
    for position in reversed(range(max((len(_NUMBER.findall(run.path)) for run in runs), default=0))):
        runs = _merge(runs, position)
    return [(run.path, run.places) for run in runs]


@dataclass(frozen=True, slots=True)
class _Run:
    """Some items as one; ``copy`` tells those apart that are alike in path and look."""

    path: str
    look: Hashable
    copy: int
    places: tuple[int, ...]


def _merge(runs: list[_Run], position: int) -> list[_Run]:
    """Merges the runs that differ in the number at one position of their paths."""
    groups: dict[tuple[str, str, Hashable, int], dict[int, _Run]] = {}
    for run in runs:
        before, number, after = _split(run.path, position)
        groups.setdefault((before, after, run.look, run.copy), {})[number] = run
    merged = []
    for (before, after, *_), group in groups.items():
        run, *others = group.values()
        if others:
            path = f"{before}{{{_ranges(sorted(group))}}}{after}"
            run = replace(run, path=path, places=tuple(place for one in group.values() for place in one.places))
        merged.append(run)
    return merged


def _split(path: str, position: int) -> tuple[str, int, str]:
    """What stands before the number at a position, the number, and what follows; -1 where there is none."""
    numbers = list(_NUMBER.finditer(path))
    if position >= len(numbers):
        return path, -1, ""
    start, end = numbers[position].span()
    return path[:start], int(path[start:end]), path[end:]


def _look(row: Row) -> Row:
    """All of a row but its path, and what it alone adds."""
    outcome = row.outcome
    if isinstance(outcome, Replaced):
        outcome = replace(outcome, error=None, detail=None)
    elif isinstance(outcome, Rejected):
        outcome = replace(outcome, detail=None)
    return replace(row, path="", outcome=outcome)


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as ``0..3,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells as text in columns; the first holds their names, the last column wraps."""
    flat: list[tuple[str, ...]] = []
    for *cells, last in lines:
        first, *more = textwrap.wrap(last, _WIDTH, break_on_hyphens=False) or [""]
        flat += [(*cells, first), *((*[""] * len(cells), text) for text in more)]
    widths = [max(map(len, column)) for column in zip(*flat, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in flat)
    return "\n".join(line.rstrip() for line in padded)


def size(nbytes: int) -> str:
    """A number of bytes for people."""
    if nbytes >= 1 << 30:
        return f"{nbytes / 2**30:.2f} GiB"
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes / 2**10:.1f} KiB"


def size_if_any(nbytes: int) -> str:
    """`size`, or a dash where there is nothing."""
    return size(nbytes) if nbytes else "-"
