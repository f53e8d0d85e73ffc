"""Times launches of the linear kernels, to choose those in kernels/launch.py: python benchmarks/sweep_linear.py

On a Hopper those of its own kernels; with --portable those of the kernel for every GPU.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import time

import torch
from dense import copies_of, random_packed
from roofline import floor_us
from timing import copies_for, time_graph

from marlin_w4a16.kernels.hopper_launch import plan_hopper
from marlin_w4a16.kernels.launch import Launch, Rows, Stream, plan_linear
from marlin_w4a16.kernels.linear import linear
from marlin_w4a16.kernels.target import SHARED_MEMORY, Target

SHAPES = ((4096, 4096), (8192, 8192), (28672, 4096), (4096, 14336))


PROCESSORS = 132


def hopper_candidates(m: int, n: int, k: int) -> list[Rows | Stream]:
    """Launches of the Hopper kernels that fit on a multiprocessor."""
    return [*rows_candidates(m, n, k), *stream_candidates(m, n, k)]


def rows_candidates(m: int, n: int, k: int) -> list[Rows]:
    if m > 16:
        return []
    out = []
    for rows, (warps, per), steps in itertools.product((16, 32, 64), ((16, 1), (8, 1), (8, 2)), (1, 2)):
        turns = -(-k // (64 * warps * steps))
        programs = min(-(-n // rows), PROCESSORS * per)
        for stages in {turns, 2, 3}:
            launch = Rows(rows, 8 if m <= 8 else 16, warps, steps, stages, stages == turns, programs)
            if stages <= turns and stages * steps <= 16 and launch.shared_memory <= SHARED_MEMORY[9, 0] // per - 1024:
                out.append(launch)
    return out


def stream_candidates(m: int, n: int, k: int) -> list[Stream]:
    if m <= 8:
        return []
    out = []
    least = next(b for b in (16, 32, 64, 128) if b >= min(m, 128))
    for rows, block_m, (tiles, stages) in itertools.product(
        (64, 128, 256), {least, 256} if m > 128 else {least}, ((2, 3), (2, 4), (2, 5), (4, 2), (4, 3), (4, 4))
    ):
        out_tiles = -(-n // rows) * -(-m // block_m)
        rest = out_tiles % PROCESSORS
        even = rest * min(PROCESSORS // max(rest, 1), -(-k // (64 * tiles)))
        for shared, (warps, overlap) in itertools.product(
            {1, even, PROCESSORS if rest else 1}, ((rows // 16, False), (rows // 16, True), (rows // 32, True))
        ):
            programs = PROCESSORS if out_tiles >= PROCESSORS else max(shared, out_tiles)
            launch = Stream(rows, block_m, tiles, stages, warps, overlap, programs, shared)
            # a warp has registers for sums of 4096 elements
            fits = launch.shared_memory <= SHARED_MEMORY[9, 0] - 1024 and warps >= 4 and rows * block_m <= 4096 * warps
            if fits and overlap <= launch.wgmma:
                out.append(launch)
    return out


def candidates(m: int) -> list[Launch]:
    rows = {
        1: [(64, 16, 64), (64, 16, 128), (128, 16, 64), (128, 16, 128)],
        32: [(64, 32, 64), (64, 32, 128), (128, 32, 64), (128, 32, 128)],
        64: [(64, 64, 64), (64, 64, 128), (128, 64, 64), (128, 64, 128)],
        128: [(64, 128, 64), (128, 128, 64)],
        256: [(64, 128, 64), (128, 128, 64), (64, 256, 64), (128, 256, 64), (256, 128, 64)],
    }[max(b for b in (1, 32, 64, 128, 256) if b <= max(m, 1))]
    out = []
    for (bn, bm, bk), warps, stages, split in itertools.product(
        rows, (4, 8), (2, 3, 4, 5), (1, 2, 4, 8) if m <= 256 else (1,)
    ):
        if (warps == 8 and bn * bk < 128 * 64) or (warps == 4 and bn * bm > 128 * 128):
            continue
        if (m >= 128 and stages == 5) or bm * bk * 2 * stages > 200 << 10:
            continue
        out.append(Launch(bn, bm, bk, split, warps, stages))
    return out


def warm(args):
    launches, dtype, kind, group = args
    packed = random_packed(256, 1024, kind, group)
    for la in launches:
        for m in (256,):
            try:
                linear(torch.randn(m, 1024, device="cuda", dtype=dtype), packed, None, la)
            except Exception as error:
                print("cannot", la, str(error)[:100], flush=True)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 32, 64, 128, 256, 1024, 4096])
    parser.add_argument("--kind", default="e4m3")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--top", type=int, default=4)
    parser.add_argument("--portable", action="store_true")
    parser.add_argument("--json")
    args = parser.parse_args()
    begin = time.time()
    if args.portable:
        launches = sorted({la for m in args.tokens for la in candidates(m)}, key=str)
        with multiprocessing.get_context("spawn").Pool(15) as pool:
            pool.map(warm, [(launches[i::15], torch.bfloat16, args.kind, args.group) for i in range(15)])
        print(f"compiled {len(launches)} in {time.time() - begin:.0f} s", flush=True)
    rows = []
    for m in args.tokens:
        for n, k in SHAPES:
            first = random_packed(n, k, args.kind, args.group)
            weights = copies_of(first) if m <= 256 else [first, first]
            copies = len(weights)
            dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies_for(n * k * 2))]
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            reps = 10 if m <= 256 else 3
            base = time_graph(lambda i: torch.nn.functional.linear(x, dense[i]), len(dense), reps)  # noqa: B023
            ref = x[:64].double() @ first.unpack().decode().T
            results = []
            for la in candidates(m) if args.portable else hopper_candidates(m, n, k):
                if time.time() - begin > args.seconds:
                    break
                try:
                    outs = [linear(x, first, None, la)[:64].double() for _ in range(4)]
                    err = max(((out - ref).norm() / ref.norm()).item() for out in outs)
                    err = err if err == err and all(torch.equal(out, outs[0]) for out in outs) else float("inf")
                    us = time_graph(lambda i: linear(x, weights[i], None, la), copies, reps)  # noqa: B023
                except Exception:
                    continue
                results.append((us, err, la))
            results.sort(key=lambda r: r[0])
            floor = floor_us(first.nbytes)
            print(f"M={m} {n}x{k} bf16 {base:.1f} floor {floor:.1f} tried {len(results)}")
            for us, err, la in results[: args.top]:
                print(f"   {us:8.2f} us  x{base / us:.2f}  err {err:.2e}  {la}", flush=True)
            try:
                plan = (
                    plan_linear(Target((9, 0), PROCESSORS), m, n, k)
                    if args.portable
                    else plan_hopper(PROCESSORS, m, n, k)
                )
                us = time_graph(lambda i: linear(x, weights[i], None, plan), copies, reps)  # noqa: B023
                print(f"   plan {us:8.2f} us  x{base / us:.2f} {plan}", flush=True)
            except Exception as error:
                print("plan failed", str(error)[:200])
            rows += [dict(m=m, n=n, k=k, bf16=base, us=us, err=err, launch=str(la)) for us, err, la in results]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    sys.exit(main())
