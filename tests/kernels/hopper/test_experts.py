"""The Gluon kernel of mixtures compiled ahead of time for Hopper: each launch, read from its machine code."""

from itertools import product

import pytest
import torch
import triton

from kernels.machine import Compiled, assert_no_spills, overwritten_operands
from kernels.plans import hopper_expert_launches, named
from marlin_w4a16.kernels.activation import FUNCTIONS, Activation
from marlin_w4a16.kernels.decode.tiles import Tiles
from marlin_w4a16.kernels.hopper_launch import plan_hopper_experts
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.layout import PackedFP4, packed_shapes
from marlin_w4a16.kernels.target import SHARED_MEMORY, gluon_is_known
from narrow import case, matrix

if not gluon_is_known():
    pytest.skip(f"the Gluon kernels are not used with Triton {triton.__version__}", allow_module_level=True)

from kernels.recorder import CAPABILITY, DTYPES, Recorder
from marlin_w4a16.kernels.hopper import experts as kernels

FORMATS = list(product(["bf16", "fp16"], [("e4m3", 16), ("e8m0", 32)]))
FORMS = hopper_expert_launches()
SWIGLU = Activation("silu", True, 1.702, 7.0, 7.0, 1.0)
PROCESSORS = 132


def launched(
    launch: Stream, what: str, dtype: str, kind: str, group: int, activation: Activation = SWIGLU, n: int = 512
) -> Recorder:
    """The first or the second product of a mixture, or a grouped linear."""
    experts, k, places, device = 4, 512, 64, "meta"
    words, scales, multiplier = packed_shapes(n, k, group)
    packed = PackedFP4(
        torch.empty((experts, *words), dtype=torch.int32, device=device),
        torch.empty((experts, *scales), dtype=torch.uint8, device=device),
        torch.empty((experts, *multiplier), dtype=torch.float32, device=device),
        n, k, kind, group,
    )  # fmt: skip
    table = torch.empty(places, dtype=torch.int32, device=device)
    tiles = Tiles(table, table, table, table, None if what == "grouped" else table, None, launch.block_m)
    x = torch.empty((places, k), dtype=DTYPES[dtype], device=device)
    width = n // 2 if what == "first" and activation.gated else n
    out = torch.empty((places, width), dtype=torch.float32 if what == "second" else x.dtype, device=device)
    bias = None if what == "grouped" else torch.empty((experts, n), dtype=x.dtype, device=device)
    how = {
        "first": {"activation": activation},
        "second": {"weights": torch.empty(places, device=device), "weighted": "output", "to_pairs": True},
        "grouped": {},
    }[what]
    recorder = Recorder(kernels._stream_experts_kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_stream_experts_kernel", recorder)
        kernels.stream_experts(x, packed, bias, out, tiles, launch, **how)
    return recorder


def forms() -> list:
    """Every form in one format as each product that the plans give it, and some in all formats. Narrow: each as the
    first product and as one of the others, the first in all formats."""
    products = ("first", "second", "grouped")
    found = [
        (launch, what, *FORMATS[0], j == 0 or i % 2 == j - 1)
        for (i, launch), (j, what) in product(enumerate(FORMS), enumerate(products))
    ]
    found += [(launch, what, *form, i == 0) for i, (launch, what, *_) in enumerate(found[::6]) for form in FORMATS[1:]]
    return [
        case(launch, what, dtype, *form, id=named(launch, what, dtype, *form), narrow=narrow)
        for launch, what, dtype, form, narrow in found
        if what == "first" or launch.rows * launch.block_m < 256 * 64  # which has too many sums for float32 ones
    ]


def assert_limits(code: Compiled, launch: Stream, per: int) -> None:
    assert_no_spills(code)
    assert code.registers * 32 * (launch.num_warps + 4) * per <= 1 << 16, "the programs do not fit in the registers"
    assert (code.shared + 1024) * per <= 228 << 10, "the programs do not fit in shared memory"
    assert code.shared <= SHARED_MEMORY[CAPABILITY]
    # activations and scattered rows use no lanes of others; what is stored is put in order through shared memory
    assert code.loop and not code.has("SHFL"), "a decoded value crosses lanes"
    if not launch.wgmma:
        assert code.has("HMMA") and not code.has("HGMMA")
        return
    assert code.has("HGMMA") and not code.has("HMMA")
    across = launch.overlap and launch.tiles == 2
    assert not overwritten_operands(code.loop, across=across), "a product still reads what is written"


@pytest.mark.parametrize("launch, what, dtype, kind, group", forms())
def test_a_launch_keeps_its_limits(launch, what, dtype, kind, group):
    assert_limits(launched(launch, what, dtype, kind, group).compiled(), launch, FORMS[launch])


@pytest.mark.parametrize("function, gated", matrix(lambda *places: sum(places) % 2 == 0, FUNCTIONS, [True, False]))
def test_every_activation_keeps_the_limits(function, gated):
    launch = list(FORMS)[1]
    code = launched(launch, "first", "bf16", "e4m3", 16, Activation(function, gated)).compiled()
    assert_limits(code, launch, FORMS[launch])


@pytest.mark.parametrize("launch", list(FORMS)[:2], ids=named)
def test_an_odd_number_of_rows_compiles_too(launch):
    code = launched(launch, "grouped", "bf16", "e4m3", 16, n=70).compiled()
    assert code.loop and code.shared <= SHARED_MEMORY[CAPABILITY]


def test_the_plan_depends_on_pairs_for_each_expert_that_is_chosen():
    blocks = [plan_hopper_experts(PROCESSORS, pairs, 128, 4096, 2048)[0].block_m for pairs in (8, 1024, 4096, 1 << 15)]
    assert blocks == [8, 16, 64, 128]
    for pairs in (1, 31, 512, 1536, 3072, 12288, 1 << 17):
        first, second = plan_hopper_experts(PROCESSORS, pairs, 128, 4096, 2048)
        assert first.block_m == second.block_m  # they share the tiles
        assert first.programs % PROCESSORS == 0 and second.programs % PROCESSORS == 0
