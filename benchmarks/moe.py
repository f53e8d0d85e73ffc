"""Mixtures of FP4 experts beside their peers, on one GPU: python benchmarks/moe.py [--model NAME ...] [--json FILE]

Microseconds of a whole call, from tokens and the experts they chose to tokens, by CUDA-graph replay over weights
rotated beyond every cache; every token chooses distinct experts, all as likely, the same for every peer. Median of
rounds in which the peers alternate; some tokens of every call are checked against float64 of the exact decode first.
Ratios are the peer's time over ours. The floor is the time to read the experts touched once, on an H200.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from dense import DTYPES, checked, ends, failure, machine, number, show, shown, write
from expert_models import MODELS, Routing, Weights, choose, draw, exact
from expert_peers import PEERS, Peer, Ready
from peers import FORMATS
from roofline import floor_us
from timing import copies_for, time_graph
from torch import Tensor

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SAMPLE = 4  # tokens that are checked, at either end
WRONG = 1e-2  # relative L2 error from which a peer is wrong; ours, from:
OURS_WRONG = {"bf16": 4e-3, "fp16": 6e-4}
BAR_TOKENS, BAR = 64, 2.0  # up to so many tokens ours should be so many times as fast as grouped_mm

Row = dict[str, Any]
Cell = dict[str, Row]  # the rows of one model and number of tokens, by peer


def cells(rows: Iterable[Row]) -> dict[tuple[str, str, int], Cell]:
    """What was timed, by format, model and tokens."""
    found: dict[tuple[str, str, int], Cell] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["format"], row["model"], row["tokens"]), {})[row["peer"]] = row
    return found


def ratio(cell: Cell, peer: str) -> float | None:
    """The peer's time over ours."""
    return cell[peer]["us"] / cell["ours"]["us"] if peer in cell and "ours" in cell else None


def misses(found: dict[tuple[str, str, int], Cell]) -> list[str]:
    """Where ours is less than `BAR` times as fast as grouped_mm and should be."""
    lines = []
    for (name, model, tokens), cell in found.items():
        reached = ratio(cell, "grouped_mm")
        if tokens <= BAR_TOKENS and reached is not None and reached < BAR:
            lines.append(f"{name} {model} T={tokens}: {reached:.2f} times as fast as grouped_mm, bar {BAR}")
    return lines


def report(rows: Sequence[Row]) -> None:
    """Prints the tables of every format, what was wrong or failed, and the misses."""
    found = cells(rows)
    for name in dict.fromkeys(row["format"] for row in rows):
        mine = {(model, tokens): cell for (of, model, tokens), cell in found.items() if of == name}
        show(f"{name}: microseconds of ours (read floor)", *table(mine, time_and_floor))
        for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] != "ours"):
            show(f"{name}: times as fast as {peer}", *table(mine, lambda cell: number(ratio(cell, peer))))  # noqa: B023
    for row in rows:
        if row["status"] != "ok":
            print(f"{row['peer']} {row['format']} {row['model']} T={row['tokens']}: {row['status']}")
    below = misses(found)
    reached = sum(ratio(cell, "grouped_mm") is not None for key, cell in found.items() if key[2] <= BAR_TOKENS)
    title = f"{BAR} times as fast as grouped_mm up to T={BAR_TOKENS}: {reached - len(below)} of {reached}"
    print(f"\n{title}", *below, sep="\n  ")


def table(some: dict[tuple[str, int], Cell], text: Callable[[Cell], str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table with a line for each model and a column for each number of tokens."""
    tokens = sorted({key[1] for key in some})
    models = dict.fromkeys(key[0] for key in some)
    lines = [[model, *(text(some.get((model, t), {})) for t in tokens)] for model in models]
    return ["", *(f"T={t}" for t in tokens)], lines


def time_and_floor(cell: Cell) -> str:
    return f"{cell['ours']['us']:.1f} ({cell['ours']['floor_us']:.1f})" if "ours" in cell else "-"


def measure(
    model: str, name: str, tokens: Sequence[int], dtype: str, some: Sequence[Peer], rounds: int, device: str = "cuda"
) -> list[Row]:
    """A row for each number of tokens and peer. The weights live as long as the call."""
    mixture, place = MODELS[model], {"model": model, "format": name}
    weights = draw(mixture, name, DTYPES[dtype], device)
    routings = [choose(t, mixture, DTYPES[dtype], device) for t in tokens]
    ready: dict[str, Ready] = {}
    rows: list[Row] = []
    for peer in some:
        try:
            ready[peer.name] = peer.prepare(weights, routings)
        except Exception as error:
            rows += [{**place, "tokens": t, "peer": peer.name, "status": failure(error)} for t in tokens]
    limits = {peer: OURS_WRONG[dtype] if peer == "ours" else WRONG for peer in ready}
    for t, routing in zip(tokens, routings, strict=True):
        x = torch.randn(t, mixture.hidden, device=device).to(DTYPES[dtype]) / 8
        found = timed(ready, x, routing, weights, limits, rounds)
        rows += [{**place, "tokens": t, "peer": peer, **row} for peer, row in found.items()]
    return rows


def timed(
    ready: dict[str, Ready], x: Tensor, routing: Routing, weights: Weights, limits: dict[str, float], rounds: int
) -> dict[str, Row]:
    """Status, relative L2 error, floor and times of each peer; only those that are right are timed."""
    some = ends(torch.arange(len(x), device=x.device), SAMPLE)
    right = exact(x[some], weights, Routing(routing.weights[some], routing.ids[some], 0))
    share = routing.touched / weights.mixture.experts
    found = {
        peer: {
            "floor_us": floor_us(round(call.nbytes * share)),
            **checked(partial(call.call, 0, x, routing), right, SAMPLE, limits[peer]),
        }
        for peer, call in ready.items()
    }
    times: dict[str, list[float]] = {peer: [] for peer in ready}
    for _ in range(rounds):
        for peer, call in ready.items():
            if found[peer]["status"] != "ok":
                continue
            copies = min(call.copies, copies_for(max(1, round(call.nbytes * share))))
            try:
                times[peer].append(time_graph(lambda i: call.call(i, x, routing), copies, 10))  # noqa: B023
            except Exception as error:
                found[peer]["status"] = failure(error)
    for peer, us in times.items():
        if found[peer]["status"] == "ok":
            found[peer] |= {"us": median(us), "rounds": us}
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME",
                        help=f"of {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="T")
    parser.add_argument("--format", choices=[*FORMATS, "all"], default="all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--peers", nargs="+", choices=names, default=["ours", "grouped_mm"], metavar="NAME",
                        help=f"of {', '.join(names)}; ours and grouped_mm if not given")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="written after every model")
    parser.add_argument("--from", dest="source", metavar="FILE.json", help="shows a run that was written; needs no GPU")
    return parser.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what was asked for, on the current GPU."""
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU; --from FILE.json shows a run that was written on one")
    wanted: list[Peer] = [peer() for peer in PEERS if peer.name in args.peers]
    absent = {peer.name: reason for peer in wanted if (reason := peer.missing())}
    some = [peer for peer in wanted if peer.name not in absent]
    result: dict[str, Any] = {"machine": machine(), "dtype": args.dtype, "absent": absent, "rows": []}
    print(", ".join(result["machine"].values()), *absent.values(), sep="; ", file=sys.stderr)
    for name in FORMATS if args.format == "all" else [args.format]:
        for model in args.model:
            began = time.perf_counter()
            result["rows"] += measure(model, name, args.tokens, args.dtype, some, args.rounds)
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{name} {model}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            write(result, args.json)
    return result


def main() -> None:
    shown(arguments(), run, report)


if __name__ == "__main__":
    main()
