"""The portable kernels of mixtures compiled ahead of time: what each launch takes, read from its machine code."""

from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch

from kernels.machine import Compiled, assert_no_spills, compiled
from kernels.portable.limits import CHIPS, FORMATS, HEAVIEST, OWN, assert_limits, assert_unaligned_limits, named
from kernels.recorder import DTYPES, Recorder, weight_without_memory
from marlin_w4a16.kernels.activation import FUNCTIONS, Activation
from marlin_w4a16.kernels.decode.route import _count_kernel, _expert_kernel, _few_kernel, _gather_kernel
from marlin_w4a16.kernels.decode.tiles import Tiles, _offset_kernel
from marlin_w4a16.kernels.launch import Launch, plan_experts
from marlin_w4a16.kernels.moe import _sum_kernel
from marlin_w4a16.kernels.portable import grouped as kernels
from marlin_w4a16.kernels.portable.grouped import FEW, _grouped_kernel
from narrow import matrix

SWIGLU = Activation("silu", True, 1.702, 7.0, 7.0, 1.0)
# Products: the first of a gated mixture, the second, a grouped linear; the first two also with a tile for every pair.
PRODUCTS = ("first", "second", "grouped", "first direct", "second direct")
# Registers by (rows, tokens, warps) of a program.
AMPERE_REGISTERS = {(64, 16, 4): 80, (64, 32, 4): 120, (64, 64, 4): 184, (128, 128, 8): 255}
SPILLS = 96  # bytes, where tiles are written
HOPPER_REGISTERS = {(64, 16, 4): 80, (64, 32, 4): 128, (64, 64, 4): 168, (128, 128, 8): 255}


def compiled_product(
    capability: tuple[int, int],
    launch: Launch,
    what: str,
    dtype: str,
    kind: str,
    group: int,
    activation: Activation = SWIGLU,
    aligned: bool = True,
) -> Compiled:
    which, direct = what.split()[0], what.endswith("direct")
    pairs, experts, n, k = 64, 4, 4096, 4096
    make = partial(torch.empty, device="meta")
    table, ids = make(pairs, dtype=torch.int32), make((pairs, 1), dtype=torch.int64)
    tiles = Tiles(table, table, table, table, None if which == "grouped" else table, None, launch.block_m)
    x = torch.empty_strided((pairs, k), (k if aligned else k + 1, 1), dtype=DTYPES[dtype], device="meta")
    bias = None if which == "grouped" else make((experts, n), dtype=x.dtype)
    out = make((pairs, n), dtype=torch.float32 if which == "second" else x.dtype)
    recorder = Recorder(_grouped_kernel)
    with patch.object(kernels, "_grouped_kernel", recorder):
        kernels.grouped_product(
            x, weight_without_memory(n, k, kind, group, experts), bias, out, ids if direct else tiles, launch,
            choices=8 if which == "first" else 1, ptx=True, wgmma=capability >= (9, 0),
            activation=activation if which == "first" else None,
            weights=make(pairs, dtype=x.dtype) if which == "second" else None, weighted="output",
            expert_map=make(experts, dtype=torch.int32),
        )  # fmt: skip
    return recorder.compiled(capability)


def planned(capability: tuple[int, int]) -> list[Launch]:
    """Every launch that a mixture or a grouped linear can have."""
    sizes = product((1, 33, 100, 300, 1000, 5000, 100000), (1, 8, 32, 128, 512))
    return list(dict.fromkeys([plan_experts(*size) or FEW for size in sizes]))


def variants() -> list[Any]:
    """Every launch of every product on SM80 and SM90, in every format for a few tokens; one where the machine code is
    all but that of SM80. Narrow: one format and, for a few tokens, the heaviest; for more tokens the second product on
    one chip and the grouped linear on the other; half of what is all but SM80's."""
    found = []
    for chip, capability in enumerate(CHIPS):
        own = capability in OWN
        for number, (launch, what) in enumerate(product(planned(capability), PRODUCTS if own else PRODUCTS[:1])):
            if what.endswith("direct") and launch != FEW:
                continue
            every, one = own and launch.block_m == 16 and what == "first", FORMATS[number % len(FORMATS)]
            for form in FORMATS if every else [one]:
                twice = launch != FEW and what == ("grouped" if chip == 0 else "second")
                narrow = form in (one, HEAVIEST) and (not twice if own else (number + chip) % 2 == 0)
                found.append(named(capability, launch, what, *form, narrow=narrow))
    return found


@pytest.mark.parametrize("capability, launch, what, dtype, kind, group", variants())
def test_a_launch_keeps_its_limits_and_its_tensor_cores(capability, launch, what, dtype, kind, group):
    code = compiled_product(capability, launch, what, dtype, kind, group)
    if capability < (9, 0) and launch.block_m == 128:
        assert code.stack <= SPILLS, "sums of 128 x 128 are half of the registers"
        assert not any(i.startswith(("LDL", "STL")) for i in code.loop)
    else:
        assert_no_spills(code)
    registers = HOPPER_REGISTERS if capability >= (9, 0) else AMPERE_REGISTERS
    assert_limits(code, capability, launch, (dtype, kind, group), registers)


@pytest.mark.parametrize(
    "capability, function, gated", matrix(lambda *places: sum(places) % 2 == 0, OWN, FUNCTIONS, [False, True])
)
def test_every_activation_is_computed_where_the_sums_are(capability, function, gated):
    code = compiled_product(
        capability, FEW, "first direct", "bf16", "e4m3", 16, Activation(function, gated, 1.5, 7.0, 7.0, 1.0)
    )
    assert_no_spills(code)
    assert not code.has("SHFL"), "a gate and its up are in different lanes"
    assert code.registers <= 64


UNALIGNED = [
    named(chip, launch, narrow=(h + i) % 2 == 0) for h, chip in enumerate(OWN) for i, launch in enumerate(planned(chip))
]


@pytest.mark.parametrize("capability, launch", UNALIGNED)
def test_rows_of_x_that_are_not_aligned_compile_too(capability, launch):
    code = compiled_product(capability, launch, "first", "bf16", "e4m3", 16, aligned=False)
    assert_unaligned_limits(code, capability, launch, sums=64)  # a quarter of the registers


TABLES = ("counts", "tile_experts", "tile_starts", "tile_stops", "count", "order", "places", "expert_map")
ROUTES = {
    "count": (_count_kernel, {"HAS_MAP": True, "BLOCK": 1024}, 16, 64),
    "tiles": (_expert_kernel, {"HAS_MAP": True, "BINS": 128, "BLOCK": 1024, "BLOCK_M": 16}, 16, 64),
    "tiles of 512": (_expert_kernel, {"HAS_MAP": True, "BINS": 512, "BLOCK": 1024, "BLOCK_M": 64}, 16, 64),
    "offsets": (_offset_kernel, {"BINS": 1024, "BLOCK_M": 16}, 4, 64),
    "gather": (_gather_kernel, {"CHOICES": 8, "BLOCK": 2048}, 4, 64),
    "few": (_few_kernel, {"HAS_MAP": True, "CHOICES": 8, "PAIRS": 32, "BLOCK": 2048, "BLOCK_M": 8}, 4, 128),
}


MADE = matrix(lambda *places: sum(places) % 3 == 0, OWN, ["i64", "i32", "u8"], ROUTES)


@pytest.mark.parametrize("capability, ids, made", MADE)
def test_what_makes_tiles_is_small(capability, ids, made):
    kernel, constants, warps, most = made
    pointers = {"ids": f"*{ids}", "offsets": f"*{ids}", "x": "*bf16", "out": "*bf16"} | dict.fromkeys(TABLES, "*i32")
    early = {"PDL": capability >= (9, 0)} if "PDL" in kernel.arg_names else {}
    code = compiled(capability, kernel, pointers, constants | early, ("k",), num_warps=warps)
    assert_no_spills(code)
    assert code.registers <= most and code.shared <= 8 << 10


SUMS = matrix(lambda h, i: (h + i) % 2 == 1, OWN, [("bf16", 1), ("bf16", 8), ("fp16", 22)])


@pytest.mark.parametrize("capability, summed", SUMS)
def test_the_sum_is_small(capability, summed):
    dtype, choices = summed
    pointers = {"parts": "*fp32", "topk_ids": "*i64", "expert_map": "*i32", "out": f"*{dtype}"}
    constants = {"CHOICES": choices, "HAS_MAP": True, "BLOCK": 512, "PDL": capability >= (9, 0)}
    code = compiled(capability, _sum_kernel, pointers, constants, ("n",))
    assert_no_spills(code)
    assert code.registers <= 96 and code.shared == 0
