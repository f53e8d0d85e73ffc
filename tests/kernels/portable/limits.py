"""The chips and formats that the portable kernels are compiled for, and what every launch of them keeps to."""

from itertools import product
from typing import Any

from kernels.machine import INSTRUCTIONS, Compiled, assert_no_spills, assert_wgmma_is_awaited
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.target import SHARED_MEMORY
from narrow import case

CHIPS = [(8, 0), (8, 6), (8, 9), (9, 0)]
OWN = [(8, 0), (9, 0)]  # the others have all but the machine code of SM80
FORMATS = list(product(["bf16", "fp16"], ["e4m3", "e8m0"], [16, 32]))
HEAVIEST = ("fp16", "e8m0", 16)  # the longest loop of all formats, whatever the launch


def named(capability: tuple[int, int], launch: Launch, *form: Any, narrow: bool) -> Any:
    """The case of a launch on a chip, in a form that follows."""
    tile = "x".join(map(str, (launch.block_n, launch.block_m, launch.block_k, launch.split_k)))
    name = "-".join(map(str, ("sm{}{}".format(*capability), tile, f"{launch.num_warps}warps", *form)))
    return case(capability, launch, *form, id=name.replace(" ", "-"), narrow=narrow)


def assert_limits(
    code: Compiled, capability: tuple[int, int], launch: Launch, form: tuple[str, str, int], registers: dict[Any, int]
) -> None:
    """Its loop, its memory and its tensor cores are as planned; ``registers`` by (rows, tokens, warps)."""
    assert code.registers <= registers[launch.block_n, launch.block_m, launch.num_warps]
    assert code.loop
    if launch.block_m == 16:
        weights = launch.block_n * launch.block_k / (32 * launch.num_warps)
        assert len(code.loop) / weights <= INSTRUCTIONS[form]
    assert code.shared <= SHARED_MEMORY[capability]
    assert not code.has("SHFL"), "a decoded value crosses lanes"
    if capability >= (9, 0):
        assert code.has("HGMMA") and not code.has("HMMA")
        assert_wgmma_is_awaited(code)
    else:
        assert code.has("HMMA")


def assert_unaligned_limits(code: Compiled, capability: tuple[int, int], launch: Launch, sums: int) -> None:
    """It fits, and does not spill where a lane has fewer sums."""
    assert code.shared <= SHARED_MEMORY[capability]
    if capability >= (9, 0):
        assert_wgmma_is_awaited(code)
    if launch.block_n * launch.block_m // (32 * launch.num_warps) < sums:
        assert_no_spills(code)
