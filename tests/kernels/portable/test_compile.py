"""The kernels compiled ahead of time for every supported chip: what each launch takes, read from its machine code."""

from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.machine import INSTRUCTIONS, Compiled, assert_no_spills, assert_wgmma_is_awaited, compiled
from kernels.plans import launches
from kernels.recorder import DTYPES, Recorder, weight_without_memory
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.portable import linear as kernels
from marlin_w4a16.kernels.portable.linear import _decode_kernel, _epilogue_kernel, _linear_kernel
from marlin_w4a16.kernels.target import SHARED_MEMORY

CHIPS = [(8, 0), (8, 6), (8, 9), (9, 0)]
FORMATS = list(product(["bf16", "fp16"], ["e4m3", "e8m0"], [16, 32]))
# Registers by (rows, tokens, warps) of a program: 9, 6, 4 and 1 of them fit on a multiprocessor, ...
AMPERE_REGISTERS = {(64, 16, 4): 56, (64, 32, 4): 80, (64, 64, 4): 128, (128, 128, 8): 176}
# ... or 8, 7, 6, 3, 2 and 2.
HOPPER_REGISTERS = {
    (64, 16, 4): 64,
    (64, 32, 4): 72,
    (64, 64, 4): 80,
    (128, 64, 4): 168,
    (128, 128, 4): 255,
    (128, 128, 8): 128,
}


def compiled_linear(
    directory: Path,
    capability: tuple[int, int],
    launch: Launch,
    dtype: str,
    kind: str,
    group: int,
    aligned: bool = True,
) -> Compiled:
    m, (n, k) = 32, (4096, 4096) if aligned else (4095, 4096)
    strides = (k, 1) if aligned else (3 * k + 1, 3)
    x = torch.empty_strided((m, k), strides, dtype=DTYPES[dtype], device="meta")
    bias, out = torch.empty(n, dtype=x.dtype, device="meta"), torch.empty((m, n), dtype=x.dtype, device="meta")
    recorder, sums = Recorder(_linear_kernel), Recorder(_epilogue_kernel)
    with patch.multiple(kernels, _linear_kernel=recorder, _epilogue_kernel=sums):
        wgmma = capability >= (9, 0)
        kernels.fused(x, weight_without_memory(n, k, kind, group), bias, out, launch, ptx=True, wgmma=wgmma)
    return recorder.compiled(directory, capability)


def named(capability: tuple[int, int], launch: Launch, *form: Any) -> Any:
    tile = "x".join(map(str, (launch.block_n, launch.block_m, launch.block_k, launch.split_k)))
    name = "-".join(map(str, ("sm{}{}".format(*capability), tile, f"{launch.num_warps}warps", *form)))
    return pytest.param(capability, launch, *form, id=name)


def variants() -> list[Any]:
    """Every launch in every format; two formats where the machine code is all but that of SM80."""
    found = []
    for capability in CHIPS:
        for number, launch in enumerate(launches(capability)):
            formats = FORMATS if capability in ((8, 0), (9, 0)) else [FORMATS[number % 8], FORMATS[-1 - number % 8]]
            found += [named(capability, launch, *form) for form in formats]
    return found


@pytest.mark.parametrize("capability, launch, dtype, kind, group", variants())
def test_a_launch_keeps_its_limits_and_its_tensor_cores(capability, launch, dtype, kind, group, tmp_path):
    code = compiled_linear(tmp_path, capability, launch, dtype, kind, group)
    assert_no_spills(code)
    limits = HOPPER_REGISTERS if capability >= (9, 0) else AMPERE_REGISTERS
    assert code.registers <= limits[launch.block_n, launch.block_m, launch.num_warps]
    assert code.loop
    if launch.block_m == 16:
        weights = launch.block_n * launch.block_k / (32 * launch.num_warps)
        assert len(code.loop) / weights <= INSTRUCTIONS[dtype, kind, group]
    assert code.shared <= SHARED_MEMORY[capability]
    assert not code.has("SHFL"), "a decoded value crosses lanes"
    if capability >= (9, 0):
        assert code.has("HGMMA") and not code.has("HMMA")
        assert_wgmma_is_awaited(code)
    else:
        assert code.has("HMMA")


@pytest.mark.parametrize("capability, launch", [named(c, la) for c in ((8, 0), (9, 0)) for la in launches(c)])
def test_a_strided_x_and_odd_rows_compile_too(capability, launch, tmp_path):
    code = compiled_linear(tmp_path, capability, launch, "bf16", "e4m3", 16, aligned=False)
    assert code.shared <= SHARED_MEMORY[capability]
    if capability >= (9, 0):
        assert_wgmma_is_awaited(code)
    if launch.block_n * launch.block_m // (32 * launch.num_warps) < 128:  # else sums take half of the registers
        assert_no_spills(code)


@pytest.mark.parametrize("parts, block", [(1, 1024), (4, 1024), (64, 16)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_the_epilogue_is_small(capability, dtype, parts, block, tmp_path):
    pointers = {"parts": "*fp32", "multiplier": "*fp32", "bias": f"*{dtype}", "out": f"*{dtype}"}
    constants = {"GAIN": 2.0**7, "HAS_BIAS": True, "PARTS": parts, "BLOCK": block}
    code = compiled(tmp_path, capability, _epilogue_kernel, pointers, constants, ("n", "stride_out"))
    assert_no_spills(code)
    assert code.registers <= 64
    assert code.shared == 0


@pytest.mark.parametrize("dtype, kind, group", [*FORMATS, ("fp32", "e4m3", 16), ("fp32", "e8m0", 32)])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_the_decode_kernel_is_small(capability, dtype, kind, group, tmp_path):
    pointers = {"words": "*i32", "scales": "*i32", "out": f"*{dtype}"}
    constants = {"kind": kind, "GROUP": group, "PTX": True}
    code = compiled(tmp_path, capability, _decode_kernel, pointers, constants)
    assert_no_spills(code)
    assert code.registers <= 40
    assert code.shared <= 8 << 10
