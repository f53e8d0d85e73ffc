"""What the backend adds to a call: the lookup of 400 NVFP4 weights, beside modules that own their packed tensors.

python benchmarks/overhead.py
"""

import platform
import statistics
import time

import torch
from torch import Tensor, nn

from marlin_w4a16 import E2M1_VALUES, quantize_nvfp4
from marlin_w4a16.passes.live.call import LiveCall
from marlin_w4a16.passes.rewrite import rewrite

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHTS = 400
TABLE = torch.tensor(E2M1_VALUES, device=DEVICE)


class NVFP4Linear(nn.Module):
    """Three leaves of its own: codes, scales, global scale; the table of values is shared."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        weight = quantize_nvfp4(torch.randn(n, k, device=DEVICE))
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.view(torch.float8_e4m3fn))
        self.register_buffer("global_scale", weight.multiplier[0].clone())

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()
        scales = self.scales.float() * self.global_scale
        weight = (TABLE[codes].unflatten(-1, (-1, 16)) * scales.unsqueeze(-1)).flatten(-2)
        return nn.functional.linear(x, weight.to(x.dtype))


def microseconds(call, repeats: int = 1000) -> float:
    """The median of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


def lookup(model: nn.Module, x: Tensor) -> tuple[float, int]:
    """Microseconds of a call whose compiled graph does nothing, and the number of leaves."""
    calls: list[tuple[LiveCall, list, int]] = []

    def backend(gm, inputs):
        rewritten = rewrite(gm, inputs)
        leaves = {i for bound in rewritten.bound for i in bound.leaves}
        calls.append((LiveCall(lambda *_: None, gm.forward, rewritten), list(inputs), len(leaves)))
        return gm.forward

    torch.compile(model, backend=backend, fullgraph=True)(x)
    ((live, inputs, leaves),) = calls
    return microseconds(lambda: live(*inputs)), leaves


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(NVFP4Linear(64, 64) for _ in range(WEIGHTS)))
    x = torch.zeros(1, 64, device=DEVICE, dtype=torch.bfloat16)
    us, leaves = lookup(model, x)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{DEVICE}, {versions}: {WEIGHTS} weights, {leaves} leaves: lookup {us:.0f} us a call")


if __name__ == "__main__":
    main()
