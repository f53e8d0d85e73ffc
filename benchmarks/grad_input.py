"""Times the gradient of an FP4 linear's input on one GPU: python benchmarks/grad_input.py

Microseconds a call, by CUDA-graph replay over rotated weights: the fused kernel as planned and with the launch that is
the fastest of those tried, the way through the dense weight and its parts, cuBLAS with a bfloat16 weight, and, once a
shape, plain torch blocks. Errors are relative L2 to the float64 product of the exact decode, with one multiplier and
with three as joined projections have them.
"""

import argparse
import functools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from peers import copies_of, random_packed
from timing import copies_for, time_graph
from torch import Tensor

from marlin_w4a16.kernels.blocks.dequantize import linear_grad_input as by_blocks
from marlin_w4a16.kernels.grad_input import linear_grad_input
from marlin_w4a16.kernels.grad_launch import GradLaunch, plan_grad_input
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.dense import write_out
from marlin_w4a16.kernels.portable.grad_input import scaled_gradient, through_dense
from marlin_w4a16.kernels.target import Target

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096), (6144, 4096))
TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
# Launches to try up to so many tokens, without a split.
TRIED = {
    16: (
        GradLaunch(16, 64, 64, 1, 4, 4),
        GradLaunch(16, 64, 64, 1, 4, 6),
        GradLaunch(16, 64, 128, 1, 4, 3),
        GradLaunch(16, 128, 64, 1, 4, 4),
        GradLaunch(16, 128, 64, 1, 8, 4),
        GradLaunch(64, 64, 64, 1, 4, 4),
    ),
    64: (
        GradLaunch(64, 64, 64, 1, 4, 4),
        GradLaunch(64, 64, 128, 1, 4, 3),
        GradLaunch(64, 128, 64, 1, 4, 3),
        GradLaunch(64, 128, 64, 1, 4, 4),
        GradLaunch(64, 128, 128, 1, 4, 3),
        GradLaunch(64, 256, 64, 1, 8, 3),
    ),
    1 << 30: (
        GradLaunch(64, 256, 64, 1, 8, 3),
        GradLaunch(128, 64, 64, 1, 4, 4),
        GradLaunch(128, 128, 64, 1, 4, 3),
        GradLaunch(128, 128, 64, 1, 8, 3),
        GradLaunch(128, 128, 64, 1, 8, 4),
        GradLaunch(128, 256, 64, 1, 8, 3),
        GradLaunch(256, 128, 64, 1, 8, 3),
    ),
}


def tried(m: int, n: int, k: int, processors: int) -> list[GradLaunch]:
    """The launches for ``m`` tokens, with every split that fills waves of programs with parts of some length."""
    found = []
    for launch in next(launches for most, launches in TRIED.items() if m <= most):
        tiles = -(-k // launch.block_k) * -(-m // launch.block_m)
        for split in (1, 2, 4, 8):
            if split == 1 or (tiles * split <= 6 * processors and n >= 4 * split * launch.block_n):
                found.append(replace(launch, split_n=split))
    return found


def warm(launches: list[GradLaunch], kind: str, group: int) -> None:
    """Compiles launches, in a process of its own, for the cache on disk."""
    packed = random_packed(1024, 1024, kind, group)
    grad = torch.randn(300, 1024, device="cuda", dtype=torch.bfloat16)
    for launch in launches:
        linear_grad_input(grad, packed, launch)
    torch.cuda.synchronize()


def error(out: Tensor, grad: Tensor, weight: Tensor, rows: Tensor) -> float:
    """Of the first tokens, for a weight in float64 and the multipliers of its rows."""
    exact = (grad[:64].double() * rows.double()) @ weight
    return ((out[:64].double() - exact).norm() / exact.norm()).item()


class Shape:
    """Weights of one shape in as many copies as no cache holds, packed and dense."""

    def __init__(self, n: int, k: int, kind: str, group: int) -> None:
        self.packed = copies_of(random_packed(n, k, kind, group))
        first = self.packed[0]
        self.exact = first.unpack().unscaled(torch.float64)
        self.dense = [self.exact.bfloat16() for _ in range(copies_for(n * k * 2))]
        self.scratch = torch.empty(first.words.shape[0] * 64, first.words.shape[1] * 64, device="cuda").bfloat16()
        parts = torch.tensor([1.0, 2.14, 0.37], device="cuda").repeat_interleave(-(-n // 3))[:n]
        self.merged = replace(first, multiplier=first.multiplier * parts)

    def time(self, call: Callable[[int], object], m: int, copies: int, repeats: int) -> float:
        """Few copies and repeats where many tokens make the weight a small part."""
        return time_graph(call, copies if m <= 128 else min(copies, 4), repeats if m <= 128 else 5)


def fastest(shape: Shape, grad: Tensor, deadline: float) -> list[tuple[float, float, GradLaunch]]:
    """Microseconds and errors of the launches that are tried, the fastest first."""
    found, (m, n) = [], grad.shape
    packed, k = shape.packed, shape.packed[0].k
    for launch in tried(m, n, k, Target.of(grad.device).processors):
        if time.time() > deadline:
            break
        try:
            out = linear_grad_input(grad, packed[0], launch)
            us = shape.time(lambda i: linear_grad_input(grad, packed[i], launch), m, len(packed), 8)  # noqa: B023
        except Exception as failure:
            print(f"   cannot {launch}: {str(failure)[:100]}")
            continue
        found.append((us, error(out, grad, shape.exact, packed[0].multiplier), launch))
    return sorted(found, key=lambda row: row[0])


def through(grad: Tensor, packed: PackedFP4) -> Tensor:
    out = torch.empty(len(grad), packed.k, dtype=grad.dtype, device=grad.device)
    through_dense(grad, packed, out)
    return out


def measure(shape: Shape, grad: Tensor, deadline: float) -> None:
    """Prints the times of one shape and number of tokens."""
    (m, n), packed, dense = grad.shape, shape.packed, shape.dense
    first = packed[0]
    wide, copies = functools.partial(torch.mm, out_dtype=torch.float32), len(packed)
    calls = {
        "dense": (lambda i: through(grad, packed[i]), copies),
        "scale": (lambda i: scaled_gradient(grad, packed[i]), copies),
        "decode": (lambda i: write_out(packed[i].words, packed[i].scales, shape.scratch, packed[i].kind), copies),
        "mm32": (lambda i: wide(grad, dense[i]), len(dense)),
        "cublas": (lambda i: torch.mm(grad, dense[i]), len(dense)),
    }
    plan = plan_grad_input(Target.of(grad.device), m, n, first.k)
    if plan is not None:
        calls = {"fused": (lambda i: linear_grad_input(grad, packed[i], plan), copies)} | calls
    us = {name: shape.time(call, m, count, 8) for name, (call, count) in calls.items()}
    if m == 64:
        us["blocks"] = time_graph(lambda i: by_blocks(grad, packed[i]), 2, 3)
    runs = {"dense": through} | ({} if plan is None else {"fused": lambda g, p: linear_grad_input(g, p, plan)})
    errors = " ".join(
        f"{name} {error(run(grad, weight), grad, shape.exact, weight.multiplier):.2e}"
        for name, run in runs.items()
        for weight in (first, shape.merged)
    )
    print(f"M={m} {n}x{first.k} " + " ".join(f"{name} {value:.1f}" for name, value in us.items()), f"| {errors}")
    for value, wrong, launch in fastest(shape, grad, deadline)[:4]:
        print(f"   {value:8.1f} us  x{us['cublas'] / value:.2f} of cublas  err {wrong:.2e}  {launch}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--kind", default="e4m3")
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--processes", type=int, default=12)
    args = parser.parse_args()
    begin = time.time()
    launches = sorted(
        {replace(launch, split_n=s) for some in TRIED.values() for launch in some for s in (1, 2)}, key=str
    )
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        jobs = [(launches[i :: args.processes], args.kind, args.group) for i in range(args.processes)]
        pool.starmap(warm, jobs)
    print(f"compiled {len(launches)} in {time.time() - begin:.0f} s: {torch.cuda.get_device_name()}", flush=True)
    for n, k in SHAPES:
        shape = Shape(n, k, args.kind, args.group)
        for m in args.tokens:
            if time.time() - begin < args.seconds:
                grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
                measure(shape, grad, begin + args.seconds)
        del shape
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
