"""The FP4 linear beside bf16 ``F.linear``: python benchmarks/dense.py [--json FILE]

Microseconds a call, by CUDA-graph replay over weights rotated beyond every cache, random data, median of alternating
runs in one process. The floor is the time to read the packed weight once.
"""

import argparse
import json
from statistics import median

import torch
from timing import copies_for, time_graph

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.linear import linear

SHAPES = ((4096, 4096), (6144, 4096), (8192, 8192), (4096, 14336), (28672, 4096), (8192, 28672))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
READ_BYTES_PER_US, FIXED_US = 4.68e6, 1.8  # measured on an H200


def random_packed(n: int, k: int, kind: str, group: int) -> PackedFP4:
    """A packed weight of random codes and scales of common sizes."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    low, high = (0x08, 0x7E) if kind == "e4m3" else (112, 132)
    scales = torch.randint(low, high, (n, k // group), dtype=torch.uint8, device="cuda")
    multiplier = (torch.rand(n, device="cuda") + 0.5) * 2.0**-12  # keeps float16 outputs in range
    return pack(FP4Weight(codes, scales, multiplier, kind, group))


def copies_of(packed: PackedFP4) -> list[PackedFP4]:
    """The weight as often as it takes to leave no cache warm."""
    n, k, kind, group = packed.n, packed.k, packed.kind, packed.group
    tensors = (packed.words, packed.scales, packed.multiplier)
    return [PackedFP4(*(t.clone() for t in tensors), n, k, kind, group) for _ in range(copies_for(packed.nbytes))]


def measure(n: int, k: int, kind: str, group: int, tokens: list[int], dtype: torch.dtype) -> list[dict]:
    """One row per token count."""
    packed = random_packed(n, k, kind, group)
    weights = copies_of(packed)
    dense = [torch.randn(n, k, device="cuda", dtype=dtype) for _ in range(copies_for(n * k * 2))]
    exact = packed.unpack().decode()
    rows = []
    for m in tokens:
        x = torch.randn(m, k, device="cuda", dtype=dtype)
        reference = x[:256].double() @ exact.T
        error = ((linear(x, packed)[:256].double() - reference).norm() / reference.norm()).item()
        ours, theirs = [], []
        for _ in range(3):
            ours.append(time_graph(lambda i: linear(x, weights[i]), len(weights) if m <= 512 else 2, 10))  # noqa: B023
            count = len(dense) if m <= 512 else 2
            theirs.append(time_graph(lambda i: torch.nn.functional.linear(x, dense[i]), count, 10))  # noqa: B023
        floor = FIXED_US + packed.nbytes / READ_BYTES_PER_US
        rows.append({"n": n, "k": k, "m": m, "kind": kind, "group": group, "us": median(ours),
                     "bf16_us": median(theirs), "floor_us": floor, "error": error})  # fmt: skip
    return rows


def show(rows: list[dict], tokens: list[int]) -> None:
    """A table of us (times as fast as bf16), a row per shape."""
    print(f"{'N x K (floor)':22s}" + "".join(f"{f'M={m}':>16s}" for m in tokens))
    for n, k in dict.fromkeys((r["n"], r["k"]) for r in rows):
        mine = [r for r in rows if (r["n"], r["k"]) == (n, k)]
        cells = "".join(f"{r['us']:9.1f} ({r['bf16_us'] / r['us']:4.2f})" for r in mine)
        shape = f"{n}x{k} ({mine[0]['floor_us']:.1f})"
        print(f"{shape:22s}{cells}")
    print(f"largest relative error against float64: {max(r['error'] for r in rows):.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--formats", nargs="+", default=["e4m3/16", "e8m0/32"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--json")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    everything = []
    for name in args.formats:
        kind, group = name.split("/")
        rows = []
        for n, k in SHAPES:
            rows += measure(n, k, kind, int(group), args.tokens, getattr(torch, args.dtype))
            torch.cuda.empty_cache()
        print(f"\n{name} {args.dtype}: us (times as fast as F.linear)")
        show(rows, args.tokens)
        everything += rows
    if args.json:
        with open(args.json, "w") as file:
            json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
