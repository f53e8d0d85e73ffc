"""compute-sanitizer finds no bad access and no race in any kernel, at shapes that no tile divides."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_w4a16.kernels.target import gluon_is_known

pytestmark = pytest.mark.gpu

PROGRAM = """
import torch
from marlin_w4a16 import linear, pack, FP4Weight
for kind, group in (("e4m3", 16), ("e8m0", 32)):
    for n, k in SHAPES:
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        scales = torch.randint(112, 120, (n, k // group), dtype=torch.uint8, device="cuda")
        packed = pack(FP4Weight(codes, scales, torch.full((n,), 2.0**-12, device="cuda"), kind, group))
        for dtype in (torch.bfloat16, torch.float16):
            bias = torch.randn(n, device="cuda", dtype=dtype)
            for m in TOKENS:
                x = torch.randn(m, k, device="cuda", dtype=dtype)
                assert linear(x, packed, bias).isfinite().all()
torch.cuda.synchronize()
print("every call is made")
"""

MIXTURES = """
import torch
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.grouped_linear import grouped_linear
from marlin_w4a16.kernels.moe import fused, moe
from mixtures.oracle import draw_mixture, draw_routing
with torch.device("cuda"):
    for name, format, dtype in (("gpt-oss", "nvfp4", torch.bfloat16), ("NemotronH", "mxfp4", torch.float16)):
        experts = draw_mixture(5, 96, 100, name, (format, format), biases=True).packed(dtype)
        for tokens in TOKENS:
            x, (weights, ids) = torch.randn(tokens, 96, dtype=dtype), draw_routing(tokens, 2, 5)
            ids[0, 0] = -1
            assert moe(x, experts, weights, ids, None).isfinite().all()
            assert moe(x, experts, weights, ids, torch.tensor([4, -1, 2, 0])).isfinite().all()
            for launch in (None, Launch(64, 16, 128, 1, 4, 4), Launch(128, 128, 64, 1, 8, 3)):
                out = torch.empty_like(x)
                fused(x, experts, weights, ids, None, out, launch, ptx=True, wgmma=False)
                assert out.isfinite().all()
            offsets = torch.tensor([0, tokens // 3, tokens // 3, tokens - 1, tokens - 1])
            assert grouped_linear(x, experts.w13, offsets).isfinite().all()
torch.cuda.synchronize()
print("every call is made")
"""


def sanitized(tool: str, shapes: tuple, tokens: tuple, program: str = PROGRAM) -> str:
    """What a tool says of the program."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    done = subprocess.run(
        [path, "--tool", tool, sys.executable, "-c", f"SHAPES, TOKENS = {shapes}, {tokens}\n{program}"],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "every call is made" in said, said[-3000:]
    return said


def hand_over() -> set[tuple[str, int]]:
    """The lines of the kernels that stand for what Triton adds to it to hand work to the warp that copies."""
    if not gluon_is_known():
        return set()
    from marlin_w4a16.kernels.hopper import experts, stream

    found = set()
    kernels = {"stream.py": stream._stream_kernel, "experts.py": experts._stream_experts_kernel}
    for file, kernel in kernels.items():
        lines, first = inspect.getsourcelines(kernel.fn)
        handing = [i for i, line in enumerate(lines) if line.startswith("def ") or "gl.warp_specialize(" in line]
        found |= {(file, first + i) for i in handing}
    return found


def test_memcheck_is_clean():
    said = sanitized("memcheck", ((70, 160), (200, 1120)), (1, 9, 17, 33, 65, 129, 257, 2049))
    assert "ERROR SUMMARY: 0 errors" in said, said[-3000:]


def test_memcheck_is_clean_for_mixtures():
    said = sanitized("memcheck", (), (1, 9, 40, 300), MIXTURES)
    assert "ERROR SUMMARY: 0 errors" in said, said[-3000:]


RACES = {"linear": (((200, 1120),), (1, 9, 33, 129, 257), PROGRAM), "mixtures": ((), (1, 9, 300), MIXTURES)}


@pytest.mark.parametrize("calls", RACES.values(), ids=RACES)
def test_racecheck_is_clean(calls):
    """But for the hand-over of Triton's warp specialisation, one byte a warp, between barriers of the whole block.

    compute-sanitizer 2025.3 reports it as soon as other warps of the block meet at a barrier of their own, also in 30
    lines of CUDA that do nothing else (docs/performance.md).
    """
    said = sanitized("racecheck", *calls)
    assert "RACECHECK SUMMARY" in said, said[-3000:]
    met = {(file, int(line)) for file, line in re.findall(r"access at .* in (\S+):(\d+)", said)}
    assert len(re.findall("access at ", said)) == len(re.findall(r"access at .* in \S+:\d+", said)), said[-3000:]
    assert met <= hand_over(), said[-3000:]
