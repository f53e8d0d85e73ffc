"""The FP4 linear beside its peers, on one GPU: python benchmarks/dense.py [--json FILE] [--plot FILE.svg]

Microseconds a call, by CUDA-graph replay over weights rotated beyond every cache, random data, median of rounds in
which the peers alternate. Every peer is checked against the float64 product of the exact decode first. Ratios are
the peer's time over ours. Floors, bars and misses are those of an H200.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
import triton
from peers import FORMATS, Peer, Prepared, exact_product, peers, random_weight
from peers import copies_of as copies_of
from peers import random_packed as random_packed
from roofline import BARS, DECODE, OTHER, TENSOR_TFLOPS, Case, all_misses, cases, geomean, large_ratios, plot
from timing import time_graph
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PACKAGES = ("humming-kernels", "vllm")  # the peers' own
SAMPLE = 128  # tokens that are checked, at either end
WRONG = 1e-2  # relative L2 error from which a peer is wrong

Row = dict[str, Any]


def show(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table by rich where it is installed, else in plain text."""
    print(f"\n{title}")
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        for line in (columns, *lines):
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(*line)
    Console(width=160).print(table)


def by_shape(some: Sequence[Case], cell: Callable[[Case], str]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table with a line for each shape and a column for each M."""
    tokens = sorted({case.m for case in some})
    found = {(case.shape, case.m): cell(case) for case in some}
    shapes = dict.fromkeys(case.shape for case in some)
    lines = [[shape, *(found.get((shape, m), "-") for m in tokens)] for shape in shapes]
    return ["N x K", *(f"M={m}" for m in tokens)], lines


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def report(rows: Sequence[Row]) -> None:
    """Prints the tables of every format, what was wrong or failed, and the misses."""
    some = cases(rows)
    for name in dict.fromkeys(case.format for case in some):
        mine = [case for case in some if case.format == name]
        marked = by_shape(mine, lambda case: number(case.us["ours"], 1) + ("!" if case.misses() else ""))
        show(f"{name}: microseconds of ours (! misses a bar)", *marked)
        for peer in dict.fromkeys(peer for case in mine for peer in case.us if peer != "ours"):
            show(f"{name}: times as fast as {peer}", *by_shape(mine, lambda case: number(case.ratio(peer))))  # noqa: B023
        title = f"{name}: of the read floor up to M={DECODE}, of {TENSOR_TFLOPS} TFLOP/s beyond"
        show(title, *by_shape(mine, lambda case: number(case.fraction)))
        show_large(name, large_ratios(mine))
    for line in bad(row for row in rows if row["peer"] != "ours"):
        print(line)
    misses = [*bad(row for row in rows if row["peer"] == "ours"), *all_misses(some)]
    print(f"\nmisses: {len(misses)}", *misses, sep="\n  ")


def show_large(name: str, ratios: dict[str, list[float]]) -> None:
    if ratios:
        ratios = {**ratios, "all": [ratio for of in ratios.values() for ratio in of]}
        lines = [[shape, number(geomean(of), 3), number(min(of), 3)] for shape, of in ratios.items()]
        show(f"{name}: times as fast as cublas, M>{DECODE}", ["N x K", "geomean", "least"], lines)


def bad(rows: Iterable[Row]) -> list[str]:
    """What was not timed, a line each; a peer that fails at every M of a shape alike is one line."""
    tokens: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["peer"], row["format"], f"{row['n']}x{row['k']}", row["status"])
            tokens.setdefault(key, []).append(row["m"])
    return [
        f"{peer} {name} {shape} M={','.join(map(str, at))}: {status}"
        for (peer, name, shape, status), at in tokens.items()
    ]


def measure(
    n: int, k: int, name: str, tokens: Sequence[int], dtype: torch.dtype, some: Sequence[Peer], rounds: int
) -> list[Row]:
    """A row for each M and peer. The peers' copies of the weight live as long as the call."""
    place = {"format": name, "n": n, "k": k}
    if k % FORMATS[name][1]:
        print(f"{name} {n}x{k}: left out, k is no multiple of the group {FORMATS[name][1]}", file=sys.stderr)
        return []
    weight = random_weight(n, k, *FORMATS[name])
    ready: dict[str, Prepared] = {}
    rows: list[Row] = []
    for peer in some:
        try:
            ready[peer.name] = peer.prepare(weight, dtype)
        except Exception as error:
            rows += [{**place, "m": m, "peer": peer.name, "status": failure(error)} for m in tokens if peer.takes(m)]
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        calls = {peer.name: ready[peer.name] for peer in some if peer.name in ready and peer.takes(m)}
        rows += [{**place, "m": m, "peer": peer, **found} for peer, found in timed(calls, x, weight, rounds).items()]
    return rows


def timed(calls: dict[str, Prepared], x: Tensor, weight: FP4Weight, rounds: int) -> dict[str, Row]:
    """Status, relative L2 error, bytes and times of each peer; only those that are right are timed."""
    exact = exact_product(ends(x, SAMPLE), weight)
    found = {
        peer: {"nbytes": call.nbytes, **checked(partial(call.call, 0, x), exact, SAMPLE, WRONG)}
        for peer, call in calls.items()
    }
    times: dict[str, list[float]] = {peer: [] for peer in calls}
    many = x.shape[0] > 512
    for _ in range(rounds):
        for peer, prepared in calls.items():
            if found[peer]["status"] != "ok":
                continue
            copies = min(2, prepared.copies) if many else prepared.copies
            try:
                times[peer].append(time_graph(lambda i: prepared.call(i, x), copies, 5 if many else 10))  # noqa: B023
            except Exception as error:
                found[peer]["status"] = failure(error)
    for peer, us in times.items():
        if found[peer]["status"] == "ok":
            found[peer] |= {"us": median(us), "rounds": us}
    return found


def checked(call: Callable[[], Tensor], exact: Tensor, count: int, limit: float) -> Row:
    """Whether the first and last tokens of a call agree with ``exact``."""
    try:
        relative = ((ends(call(), count).double() - exact).norm() / exact.norm()).item()
    except Exception as error:
        return {"status": failure(error)}
    return {"status": "ok" if relative <= limit else f"wrong: relative error {relative:.1e}", "error": relative}


def ends(tokens: Tensor, count: int) -> Tensor:
    """The first and the last few."""
    return torch.cat((tokens[:count], tokens[count:][-count:]))


def failure(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def shape(text: str) -> tuple[int, int]:
    n, k = text.lower().split("x")
    return int(n), int(k)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, action="append", metavar="NxK", help="outputs by inputs; repeatable")
    parser.add_argument("--bars", action="store_true", help="the shapes that have bars in microseconds (the default)")
    parser.add_argument("--other", action="store_true", help="the other shapes")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), metavar="M")
    parser.add_argument("--format", choices=[*FORMATS, "all"], default="all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--peers", nargs="+", metavar="NAME", help="of ours, cublas, portable, humming, marlin, compiled"
    )
    parser.add_argument("--compiled", action="store_true", help="the compiled dequantisation at every M: slow")
    parser.add_argument("--json", metavar="FILE", help="written after every shape")
    parser.add_argument("--plot", metavar="FILE.svg", help="the roofline picture; needs matplotlib")
    parser.add_argument("--from", dest="source", metavar="FILE.json", help="shows a run that was written; needs no GPU")
    return parser.parse_args()


def chosen_peers(args: argparse.Namespace) -> tuple[list[Peer], dict[str, str]]:
    """Those to time, and why each of the others cannot be."""
    known = peers(args.tokens, args.compiled)
    names = [peer.name for peer in known]
    unknown = sorted(set(args.peers or ()) - set(names))
    if unknown:
        sys.exit(f"--peers: found {', '.join(unknown)}, expected some of {', '.join(names)}")
    wanted = [peer for peer in known if not args.peers or peer.name in args.peers]
    absent = {peer.name: reason for peer in wanted if (reason := peer.missing())}
    return [peer for peer in wanted if peer.name not in absent], absent


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures what was asked for, on the current GPU."""
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA GPU; --from FILE.json shows a run that was written on one")
    shapes = (args.shape or []) + list(BARS) * args.bars + list(OTHER) * args.other or list(BARS)
    formats = list(FORMATS) if args.format == "all" else [args.format]
    some, absent = chosen_peers(args)
    result: dict[str, Any] = {"machine": machine(), "dtype": args.dtype, "absent": absent, "rows": []}
    print(", ".join(result["machine"].values()), *absent.values(), sep="; ", file=sys.stderr)
    for peer in some:
        began = time.perf_counter()
        peer.warm(shapes, formats, DTYPES[args.dtype])
        print(f"{peer.name}: compiled ahead in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for name in formats:
        for n, k in shapes:
            began = time.perf_counter()
            result["rows"] += measure(n, k, name, args.tokens, DTYPES[args.dtype], some, args.rounds)
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{name} {n}x{k}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            write(result, args.json)
    return result


def machine() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": f"torch {torch.__version__}",
        "triton": f"Triton {triton.__version__}",
        **{name: f"{name} {version(name)}" for name in PACKAGES if installed(name)},
    }


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def write(result: dict[str, Any], path: str | None) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)


def picture(result: dict[str, Any], path: str) -> None:
    """The roofline of the first format that was timed."""
    right = [row for row in result["rows"] if row["status"] == "ok"]
    if not right:
        sys.exit("--plot: nothing to draw, no peer was timed")
    name = right[0]["format"]
    title = f"{name.upper()}, {result['dtype']}, {result['machine']['device']}"
    plot([row for row in right if row["format"] == name], title, path)


def shown(args: argparse.Namespace, run: Callable[..., Any], report: Callable[..., None]) -> dict[str, Any]:
    """What was measured, now or in a run that was written, after its tables are printed."""
    if args.source:
        with open(args.source) as file:
            result = json.load(file)
    else:
        result = run(args)
    print(", ".join([*result["machine"].values(), result["dtype"]]))
    report(result["rows"])
    return result


def main() -> None:
    args = arguments()
    result = shown(args, run, report)
    if args.plot:
        picture(result, args.plot)


if __name__ == "__main__":
    main()
