"""Generates near misses, runs them on all cores, and prints what became of each kind.

    PYTHONPATH=tests python -m attacks --count 1000 --seed 0

Exits with 1 if any is wrong. A seed gives the same program again: ``--only linears --seed 4711 --count 1``.
"""

import argparse
import contextlib
import os
import sys
from collections import Counter, defaultdict
from multiprocessing import get_context

from rich.console import Console
from rich.progress import track
from rich.table import Table

from attacks.run import OUTCOMES, Result
from attacks.work import KINDS, attack, blocks, quiet

_SEEDS = 3  # of what is wrong, for each mutation


def table(title: str, of: str, results: dict[str, list[Result]]) -> Table:
    """Outcomes by name; seeds of what is wrong."""
    shown = Table(title=title)
    shown.add_column(of)
    for name in ("all", *OUTCOMES):
        shown.add_column(name, justify="right")
    shown.add_column("wrong seeds")
    for name, some in sorted(results.items(), key=lambda item: (-_wrong(item[1]), item[0])):
        counts = Counter(result.outcome for result in some)
        seeds = [str(result.seed) for result in some if result.outcome == "wrong"][:_SEEDS]
        shown.add_row(name, str(len(some)), *(str(counts[o] or "") for o in OUTCOMES), " ".join(seeds))
    return shown


def _wrong(results: list[Result]) -> int:
    return sum(result.outcome == "wrong" for result in results)


def _by(results: list[Result], of: str) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        found[getattr(result, of)].append(result)
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="attacks", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="linears; a tenth as many mixtures")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--only", choices=list(KINDS), help="one kind, --count of it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    counts = {given.only: given.count} if given.only else {"linears": given.count, "mixtures": -(-given.count // 10)}
    todo = [block for kind, count in counts.items() for block in blocks(kind, given.seed, count)]
    found: dict[str, list[Result]] = defaultdict(list)
    interrupted = contextlib.suppress(KeyboardInterrupt)  # what is found by then is shown
    with interrupted, get_context("spawn").Pool(given.jobs, quiet, maxtasksperchild=200) as pool:
        running = pool.imap_unordered(attack, todo)
        for kind, results in track(running, "attacking", len(todo), console=Console(stderr=True)):
            found[kind] += results
    console = Console(width=None if sys.stdout.isatty() else 200)
    for kind, results in found.items():
        results.sort(key=lambda result: result.seed)
        console.print(
            table(f"near misses of {kind}", "mutation", _by([r for r in results if r.kind == "near"], "mutation"))
        )
        console.print(table(f"true {kind}", "form", _by([r for r in results if r.kind == "true"], "family")))
        console.print(table(f"all {kind}", "kind", _by(results, "kind")))
        for result in results:
            if result.outcome in ("wrong", "not traced"):
                console.print(
                    f"{result.outcome}: {kind} {result.seed}, {result.form}: {result.mutation}: {result.detail}",
                    markup=False,
                )
    return int(any(_wrong(results) for results in found.values()))


if __name__ == "__main__":
    sys.exit(main())
