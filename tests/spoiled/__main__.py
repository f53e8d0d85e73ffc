"""Spoils checkpoints, loads and inspects each, and prints what became of them by what was done.

    PYTHONPATH=tests python -m spoiled --count 2000 --seed 0

Exits with 1 if any raises what it should not, hangs, or loads as something else. A seed gives the same checkpoint
again: ``--seed 4711 --count 1``; ``--keep FOLDER`` writes it there and does no more.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from spoiled.case import generate
from spoiled.run import BAD, OUTCOMES, Result
from spoiled.work import run

_SEEDS = 3  # of what is bad, for each spoiler


def table(title: str, of: str, results: dict[str, list[Result]]) -> Table:
    """Outcomes by name; seeds of what is bad."""
    shown = Table(title=title)
    shown.add_column(of)
    for name in ("all", *OUTCOMES):
        shown.add_column(name, justify="right")
    shown.add_column("bad seeds")
    for name, some in sorted(results.items()):
        counts = Counter(result.outcome for result in some)
        seeds = [str(result.seed) for result in some if result.outcome in BAD][:_SEEDS]
        shown.add_row(name, str(len(some)), *(str(counts[o] or "") for o in OUTCOMES), " ".join(seeds))
    return shown


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="spoiled", description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--keep", type=Path, help="an empty folder, in which the first is written")
    parser.add_argument("--told", action="store_true", help="print what was said of each")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.count)
    if given.keep is not None:
        given.keep.mkdir(exist_ok=True)
        case = generate(given.seed)
        case.parts.write(given.keep)
        print(case.name)
        return 0
    results = list(track(run(seeds), "spoiling", len(seeds), console=Console(stderr=True)))
    console = Console(width=None if sys.stdout.isatty() else 200)
    by_spoiler, by_kind = defaultdict(list), defaultdict(list)
    for result in results:
        for spoiler in result.spoilers:
            by_spoiler[spoiler].append(result)
        by_kind[result.kind].append(result)
    console.print(table("by what was done, one to three things at a time", "spoiler", by_spoiler))
    console.print(table("by what was spoiled", "checkpoint", {**by_kind, "~ all": results}))
    longest = max(results, key=lambda result: result.seconds)
    console.print(f"the longest step took {longest.seconds:.1f} s (seed {longest.seed})")
    for result in results:
        if result.outcome in BAD or given.told:
            said = f"{result.seed} {result.outcome}: {result.kind}, {' + '.join(result.spoilers)}: {result.detail}"
            console.print(said.encode(errors="replace").decode(), markup=False, soft_wrap=True)
    return int(any(result.outcome in BAD for result in results))


if __name__ == "__main__":
    sys.exit(main())
