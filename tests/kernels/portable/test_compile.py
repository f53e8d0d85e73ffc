"""The kernels compiled ahead of time for every supported chip: what each launch takes, read from its machine code."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.machine import Compiled, assert_no_spills, compiled
from kernels.plans import launches
from kernels.portable.limits import CHIPS, FORMATS, HEAVIEST, OWN, assert_limits, assert_unaligned_limits, named
from kernels.recorder import DTYPES, Recorder, weight_without_memory
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.portable import linear as kernels
from marlin_w4a16.kernels.portable.dense import _decode_kernel
from marlin_w4a16.kernels.portable.linear import _epilogue_kernel, _linear_kernel
from narrow import matrix

# Registers by (rows, tokens, warps) of a program: 9, 6, 4 and 1 of them fit on a multiprocessor, ...
AMPERE_REGISTERS = {(64, 16, 4): 56, (64, 32, 4): 80, (64, 64, 4): 128, (128, 128, 8): 176}
# ... or 8, 7, 6, 3, 2 and 2.
HOPPER_REGISTERS = {
    (64, 16, 4): 64, (64, 32, 4): 72, (64, 64, 4): 80, (128, 64, 4): 168, (128, 128, 4): 255, (128, 128, 8): 128,
}  # fmt: skip


def compiled_linear(
    capability: tuple[int, int], launch: Launch, dtype: str, kind: str, group: int, aligned: bool = True
) -> Compiled:
    m, (n, k) = 32, (4096, 4096) if aligned else (4095, 4096)
    strides = (k, 1) if aligned else (3 * k + 1, 3)
    x = torch.empty_strided((m, k), strides, dtype=DTYPES[dtype], device="meta")
    bias, out = torch.empty(n, dtype=x.dtype, device="meta"), torch.empty((m, n), dtype=x.dtype, device="meta")
    recorder, sums = Recorder(_linear_kernel), Recorder(_epilogue_kernel)
    with patch.multiple(kernels, _linear_kernel=recorder, _epilogue_kernel=sums):
        wgmma = capability >= (9, 0)
        kernels.fused(x, weight_without_memory(n, k, kind, group), bias, out, launch, ptx=True, wgmma=wgmma)
    return recorder.compiled(capability)


def variants() -> list[Any]:
    """Every launch in every format; two formats where the machine code is all but that of SM80.

    Of these are narrow: the first launch in half of the formats, the other half on the other chip; any other in one,
    which is the heaviest without a split; a quarter of the launches of SM86 and SM89.
    """
    found = []
    for chip, capability in enumerate(CHIPS):
        for number, launch in enumerate(launches(capability)):
            one = FORMATS[(number + number // 2) % 8]
            if capability in OWN:
                half = [FORMATS[i] for i in ((0, 3, 5, 6) if chip == 0 else (1, 2, 4, 7))]
                kept = half if number == 0 else [HEAVIEST] if launch.split_k == 1 else [one]
                found += [named(capability, launch, *form, narrow=form in kept) for form in FORMATS]
            else:
                found.append(named(capability, launch, *one, narrow=(number + chip) % 4 == 0))
                found.append(named(capability, launch, *FORMATS[-1 - FORMATS.index(one)], narrow=False))
    return found


@pytest.mark.parametrize("capability, launch, dtype, kind, group", variants())
def test_a_launch_keeps_its_limits_and_its_tensor_cores(capability, launch, dtype, kind, group):
    code = compiled_linear(capability, launch, dtype, kind, group)
    assert_no_spills(code)
    registers = HOPPER_REGISTERS if capability >= (9, 0) else AMPERE_REGISTERS
    assert_limits(code, capability, launch, (dtype, kind, group), registers)


UNALIGNED = [
    named(chip, launch, narrow=number % 4 == 2 * i)
    for i, chip in enumerate(OWN)
    for number, launch in enumerate(launches(chip))
]


@pytest.mark.parametrize("capability, launch", UNALIGNED)
def test_a_strided_x_and_odd_rows_compile_too(capability, launch):
    code = compiled_linear(capability, launch, "bf16", "e4m3", 16, aligned=False)
    assert_unaligned_limits(code, capability, launch, sums=128)  # half of the registers


EPILOGUES = matrix(
    lambda *places: sum(places) % 3 == 0, OWN, ["bf16", "fp16", "fp32"], [(1, 1024), (4, 1024), (64, 16)]
)


@pytest.mark.parametrize("capability, dtype, parts", EPILOGUES)
def test_the_epilogue_is_small(capability, dtype, parts):
    pointers = {"parts": "*fp32", "multiplier": "*fp32", "bias": f"*{dtype}", "out": f"*{dtype}"}
    constants = {"GAIN": 2.0**7, "HAS_BIAS": True, "PARTS": parts[0], "BLOCK": parts[1]}
    code = compiled(capability, _epilogue_kernel, pointers, constants, ("n", "stride_out"))
    assert_no_spills(code)
    assert code.registers <= 64 and code.shared == 0


DECODED = [*FORMATS, ("fp32", "e4m3", 16), ("fp32", "e8m0", 32)]


@pytest.mark.parametrize("capability, form", matrix(lambda h, i: (h + i + i // 2) % 2 == 0, OWN, DECODED))
def test_the_decode_kernel_is_small(capability, form):
    dtype, kind, group = form
    pointers = {"words": "*i32", "scales": "*i32", "out": f"*{dtype}"}
    constants = {"kind": kind, "GROUP": group, "TILES": 2, "PTX": True}
    code = compiled(capability, _decode_kernel, pointers, constants, ("stride",))
    assert_no_spills(code)
    assert code.registers <= 72 and code.shared <= 16 << 10
    wide = [i for i in code.instructions if i.startswith("STG")]
    assert wide and all(i.startswith("STG.E.128") for i in wide)
