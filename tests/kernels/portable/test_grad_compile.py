"""The kernels of the gradient of a linear's input compiled ahead of time: what each launch takes, read from its machine
code."""

from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.machine import NEWER, Compiled, assert_no_spills, assert_wgmma_is_awaited
from kernels.plans import grad_launches
from kernels.portable.limits import CHIPS, FORMATS, HEAVIEST, OWN
from kernels.recorder import DTYPES, Recorder, weight_without_memory
from marlin_w4a16.kernels.grad_launch import GradLaunch
from marlin_w4a16.kernels.portable import grad_input as kernels
from marlin_w4a16.kernels.target import SHARED_MEMORY
from narrow import case, matrix

# Registers by (tokens, columns, warps) of a program.
AMPERE_REGISTERS = {(16, 64, 4): 88, (32, 64, 4): 128, (64, 64, 4): 128, (128, 128, 8): 224}
HOPPER_REGISTERS = {(16, 64, 4): 80, (32, 64, 4): 128, (64, 64, 4): 96, (128, 64, 4): 152}
NAMES = ("_scale_kernel", "_grad_input_kernel", "_epilogue_kernel")


def compiled_gradient(
    capability: tuple[int, int], launch: GradLaunch, dtype: str, kind: str, group: int, strides: tuple[int, int]
) -> dict[str, Any]:
    """Kernels by name, not compiled yet."""
    m, n, k = 300, 4096, 4096
    grad = torch.empty_strided((m, n), strides, dtype=DTYPES[dtype], device="meta")
    out = torch.empty((m, k), dtype=grad.dtype, device="meta")
    recorders = {name: Recorder(getattr(kernels, name)) for name in NAMES}
    with patch.multiple(kernels, **recorders):
        wgmma = capability >= (9, 0)
        kernels.fused(grad, weight_without_memory(n, k, kind, group), out, launch, ptx=True, wgmma=wgmma)
    return recorders


def variants() -> list[Any]:
    """Every launch in every format; two formats where the machine code is all but that of SM80.

    Of these are narrow: the first launch in half of the formats, the other half on the other chip; any other in one,
    which is the heaviest without a split; a quarter of the launches of SM86 and SM89.
    """
    found = []
    for chip, capability in enumerate(CHIPS):
        for number, launch in enumerate(grad_launches(capability)):
            one = FORMATS[number % 8]
            half = [FORMATS[i] for i in ((0, 3, 5, 6) if chip == 0 else (1, 2, 4, 7))]
            kept = half if number == 0 else [HEAVIEST] if launch.split_n == 1 else [one]
            for form in FORMATS if capability in OWN else (one, FORMATS[-1 - FORMATS.index(one)]):
                tile = "x".join(map(str, (launch.block_m, launch.block_k, launch.block_n, launch.split_n)))
                name = "-".join(map(str, ("sm{}{}".format(*capability), tile, *form)))
                narrow = form in kept if capability in OWN else form == one and number % 4 == 0
                found.append(case(capability, launch, *form, id=name, narrow=narrow))
    return found


@pytest.mark.parametrize("capability, launch, dtype, kind, group", variants())
def test_a_launch_keeps_its_limits_and_its_tensor_cores(capability, launch, dtype, kind, group):
    recorder = compiled_gradient(capability, launch, dtype, kind, group, (4096, 1))["_grad_input_kernel"]
    code: Compiled = recorder.compiled(capability)
    assert_no_spills(code, most=16 if NEWER and capability >= (9, 0) and launch.block_m == 16 else 0)
    registers = HOPPER_REGISTERS if capability >= (9, 0) else AMPERE_REGISTERS
    assert code.registers <= registers[launch.block_m, launch.block_k, launch.num_warps]
    assert code.shared <= SHARED_MEMORY[capability]
    assert code.loop and not code.has("SHFL"), "a decoded value crosses lanes"
    if capability >= (9, 0) and launch.block_m >= 64:
        assert code.has("HGMMA") and not code.has("HMMA")
        assert_wgmma_is_awaited(code)
    else:
        # both operands are loaded by ldmatrix: what is left are the words and the scales of a tile
        assert code.has("HMMA") and code.has("LDSM.16.MT88.4", "LDSM.T.16", "LDSM.16.M88.4")
        assert sum(i.startswith("LDS.") for i in code.loop) <= 2 * launch.block_k * launch.block_n // 4096


@pytest.mark.parametrize(
    "capability, dtype, strides",
    matrix(lambda *places: sum(places) % 2 == 0, OWN, list(DTYPES), [(4096, 1), (4099, 3)]),
)
def test_what_stands_around_it_is_small(capability, dtype, strides):
    launch = GradLaunch(16, 64, 64, 4, 4, 3)
    recorders = compiled_gradient(capability, launch, dtype, "e4m3", 16, strides)
    for name in ("_scale_kernel", "_epilogue_kernel"):
        code = recorders[name].compiled(capability)
        assert_no_spills(code)
        assert code.registers <= 80 and code.shared <= 1 << 10
