"""What `doctor` tries on a device: linears, a compiled model, a CUDA graph, Triton without a GPU."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.cli.checks import REPORT, Check
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.fp4 import E2M1_VALUES, FP4Weight, format_name
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.kernels.target import Target
from marlin_w4a16.report.table import size

Linear = Callable[[Tensor, PackedFP4, Tensor | None], Tensor]
CASES = ((1, 256, 512), (16, 256, 512), (64, 256, 512), (7, 200, 1120))  # tokens, rows, columns
LIMITS = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}  # of the relative L2 error
_LUCK = 1.02  # times the error of rounding the exact result, where few outputs make that larger than the limit


def relative_error(out: Tensor, exact: Tensor) -> tuple[float, float]:
    """The relative L2 error of an output and the most that it may be; infinite for NaN and another shape or dtype."""
    if out.shape != exact.shape or out.dtype not in LIMITS or not out.isfinite().all():
        return float("inf"), LIMITS.get(out.dtype, 0.0)
    length = exact.norm()
    best = (exact.to(out.dtype).double() - exact).norm() / length
    error = (out.double() - exact).norm() / length
    return float(error), max(LIMITS[out.dtype], _LUCK * float(best))


def try_linears(device: torch.device, op: Linear = linear) -> list[Check]:
    """Small products of each format and dtype against the float64 product of the exactly decoded weight."""
    formats = product((quantize_nvfp4, quantize_mxfp4), LIMITS)
    return [_try_format(device, quantize, dtype, op) for quantize, dtype in formats]


def _try_format(device: torch.device, quantize: Callable[[Tensor], FP4Weight], dtype: torch.dtype, op: Linear) -> Check:
    generator = torch.Generator().manual_seed(0)
    worst, wrong, name = 0.0, [], ""
    for m, n, k in CASES:
        weight = quantize(torch.randn(n, k, generator=generator).to(device)).fit(dtype)
        x, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (n,)))
        out = op(x, pack(weight), bias)
        error, limit = relative_error(out, x.double() @ weight.decode().T + bias.double())
        worst = max(worst, error)
        if error > limit:
            wrong.append(f"{m} x {k} by {n} x {k}: {error:.1e}")
        name = f"{format_name(weight.kind, weight.group)}, {str(dtype).removeprefix('torch.')}, {device}"
    expected = f"relative error of at most {LIMITS[dtype]}"
    if wrong:
        return Check(name, "problem", f"wrong results: {'; '.join(wrong)}", expected, REPORT)
    return Check(name, "ok", f"{len(CASES)} products are right, relative error {worst:.1e}", expected)


class HandWritten(nn.Module):
    """A linear as a model's author writes it: NVFP4 codes and scales, decoded by a table in forward.

    Its activation is there for Inductor to compile something.
    """

    def __init__(self, weight: FP4Weight) -> None:
        super().__init__()
        self.codes = nn.Parameter(weight.codes, requires_grad=False)
        self.scales = nn.Parameter(weight.scales.view(torch.float8_e4m3fn), requires_grad=False)
        self.factor = nn.Buffer(weight.multiplier[0].clone())
        self.table = nn.Buffer(torch.tensor(E2M1_VALUES, device=weight.codes.device))

    def forward(self, x: Tensor) -> Tensor:
        """``relu(x @ weight.T)`` for x ``[..., k]``, the weight decoded in its dtype."""
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()
        scales = (self.scales.float() * self.factor).unsqueeze(-1)
        dense = (self.table[codes].view(*scales.shape[:2], -1) * scales).flatten(-2)
        return nn.functional.linear(x, dense.to(x.dtype)).relu()


def try_compiled(device: torch.device, backend: str | Callable[..., Any] = "marlin_w4a16") -> Check:
    """One round of torch.compile: the backend's report says that the weight was replaced, and the result is right."""
    name, expected = f"torch.compile, {device}", "replaced 1 of 1 FP4 linears, and a right result"
    generator = torch.Generator().manual_seed(0)
    weight = quantize_nvfp4(torch.randn(96, 128, generator=generator).to(device))
    x = torch.randn(16, 128, generator=generator).to(device, torch.bfloat16)
    with torch.no_grad(), _told() as lines:
        out = torch.compile(HandWritten(weight), backend=backend)(x)
    error, limit = relative_error(out, (x.double() @ weight.decode().T).relu())
    told = "; ".join(lines) or "the backend was not called"
    if not lines:
        return Check(name, "problem", told, expected, "unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE")
    if not told.startswith("replaced 1 of 1"):
        return Check(name, "problem", told, expected, REPORT)
    if error > limit:
        return Check(name, "problem", f"wrong result, relative error {error:.1e}: {told}", expected, REPORT)
    return Check(name, "ok", f"{told}; relative error {error:.1e}", expected)


def try_graph(device: torch.device, op: Linear = linear) -> Check:
    """A linear captured in a CUDA graph gives with new contents what it gives alone."""
    name, expected = f"CUDA graph, {device}", "a replay gives what a call gives"
    generator = torch.Generator().manual_seed(0)
    packed = pack(quantize_nvfp4(torch.randn(256, 512, generator=generator).to(device)))
    x, other = (torch.randn(1, 512, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    with torch.cuda.device(device):
        op(x, packed, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = op(x, packed, None)
        x.copy_(other)
        graph.replay()
        if not torch.equal(out, op(other, packed, None)):
            return Check(name, "problem", "a replay gives other bits than a call", expected, REPORT)
    return Check(name, "ok", "captured and replayed with new contents", expected)


def try_triton(capability: tuple[int, int]) -> Check:
    """Triton compiles the portable kernel to machine code for a GPU that need not be there."""
    from marlin_w4a16.kernels.portable.linear import compile_ahead  # Triton is on Linux only

    code = compile_ahead(Target(capability, processors=132))
    name = "Triton for sm_{}{}".format(*capability)
    return Check(name, "ok", f"compiled to {size(len(code))} of machine code", "machine code, no GPU needed")


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _told() -> Iterator[list[str]]:
    """What the backend says of each graph that is compiled inside it."""
    log, handler = logging.getLogger("marlin_w4a16"), _Lines()
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield handler.lines
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]
