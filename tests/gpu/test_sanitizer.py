"""compute-sanitizer finds no bad access and no race in any kernel, at shapes that no tile divides."""

import os
import shutil
import subprocess
import sys

import pytest

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
"""


def sanitized(tool: str, shapes: tuple, tokens: tuple) -> str:
    """What a tool says of the program; its end where that is a failure."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    done = subprocess.run(
        [path, "--tool", tool, "--error-exitcode", "7", sys.executable, "-c",
         f"SHAPES, TOKENS = {shapes}, {tokens}\n{PROGRAM}"],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_memcheck_is_clean():
    said = sanitized("memcheck", ((70, 160), (200, 1120)), (1, 9, 17, 33, 65, 129, 257, 2049))
    assert "ERROR SUMMARY: 0 errors" in said, said[-3000:]


def test_racecheck_is_clean():
    said = sanitized("racecheck", ((200, 1120),), (1, 9, 33, 129))
    assert "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" in said, said[-3000:]
