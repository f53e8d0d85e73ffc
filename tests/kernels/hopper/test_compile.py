"""The Gluon kernels compiled ahead of time for Hopper: what each launch takes, read from its machine code."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import triton

from kernels.machine import NEWER, Compiled, assert_no_spills, overwritten_operands
from kernels.plans import evenly, hopper_launches, named
from marlin_w4a16.kernels.launch import Rows, Stream
from marlin_w4a16.kernels.layout import PackedFP4, packed_shapes
from marlin_w4a16.kernels.target import SHARED_MEMORY, gluon_is_known
from narrow import case

if not gluon_is_known():
    pytest.skip(f"the Gluon kernels are not used with Triton {triton.__version__}", allow_module_level=True)

from kernels.recorder import CAPABILITY, DTYPES, Recorder
from marlin_w4a16.kernels.hopper import rows, stream

FORMS = list(product(["bf16", "fp16"], [("e4m3", 16), ("e8m0", 32)]))
LAUNCHES = hopper_launches()
# Bytes that ptxas spills where it would rather have 64 registers than a few more, or has to keep to 128.
SPILLS = {
    Rows(rows=16, block_m=16, num_warps=16, steps=1, stages=3, resident=False, programs=1): 8,
    Rows(rows=16, block_m=8, num_warps=16, steps=2, stages=3, resident=False, programs=1): 24,
    Rows(rows=32, block_m=8, num_warps=16, steps=1, stages=5, resident=True, programs=1): 16,
    Rows(rows=64, block_m=8, num_warps=8, steps=1, stages=3, resident=True, programs=1): 16,  # fp16 at uneven k alone
}
# Instructions of a lane for each weight that it decodes, and for each tile: see `most_instructions`.
INSTRUCTIONS = {
    ("bf16", "e4m3", 16): 2.69, ("bf16", "e8m0", 32): 2.90, ("fp16", "e4m3", 16): 2.95, ("fp16", "e8m0", 32): 3.93,
}  # fmt: skip


def launched(launch: Rows | Stream, k: int, dtype: str, kind: str, group: int, n: int) -> list[Recorder]:
    """The kernels that a launch starts."""
    k = -(-k // 64) * 64
    (words, scales, multiplier), device = packed_shapes(n, k, group), "meta"
    packed = PackedFP4(
        torch.empty(words, dtype=torch.int32, device=device),
        torch.empty(scales, dtype=torch.uint8, device=device),
        torch.empty(multiplier, dtype=torch.float32, device=device),
        n, k, kind, group,
    )  # fmt: skip
    x, out = (torch.empty((launch.block_m, size), dtype=DTYPES[dtype], device=device) for size in (k, n))
    bias = torch.empty(n, dtype=DTYPES[dtype], device=device)
    module, run = (rows, rows.by_rows) if isinstance(launch, Rows) else (stream, stream.stream)
    names = ["_rows_kernel"] if isinstance(launch, Rows) else ["_stream_kernel", "_sum_kernel"]
    with pytest.MonkeyPatch.context() as patch:
        recorders = [Recorder(getattr(module, name)) for name in names]
        for name, recorder in zip(names, recorders, strict=True):
            patch.setattr(module, name, recorder)
        run(x, packed, bias, out, launch)
    return recorders


def variants(kernel: type) -> list:
    """Every launch in one format, and some in all. Narrow: of launches that only differ in stages the one with most, of
    those for few tokens every other, and what spills; one format in turn, and all for the first."""
    of_kernel = [(*key, *value) for key, value in LAUNCHES.items() if isinstance(key[0], kernel)]
    of_most = {replace(call[0], stages=0): call for call in sorted(of_kernel, key=lambda call: call[0].stages)}
    kept = [*of_most.values()][:: 2 if kernel is Rows else 1]
    found = [(*call, *FORMS[0], call[0] in SPILLS or call in kept) for call in of_kernel]
    found += [
        (*call, *form, i == 0 or i % 6 == j)
        for (i, call), (j, form) in product(enumerate(of_kernel[::6]), enumerate(FORMS[1:]))
    ]
    return [
        case(launch, k, shared, dtype, *form, id=named(launch, -(-k // 64), dtype, *form), narrow=narrow)
        if kernel is Rows
        else case(launch, dtype, *form, id=named(launch, launch.tiles, dtype, *form), narrow=narrow)
        for launch, _, k, shared, dtype, form, narrow in found
    ]


def count(code: list[str], opcode: str, *parts: str) -> int:
    return sum(i.startswith(opcode) and all(part in i.split(maxsplit=1)[0] for part in parts) for i in code)


def most_instructions(launch: Rows, even: bool, form: tuple[str, str, int]) -> float:
    """The limit of the loop that multiplies: a block with its end, or a turn of the ring."""
    tiles = launch.steps * (launch.stages if launch.resident else 1)
    operands = tiles * launch.rows // 16
    products, step = 10 * operands if launch.block_m == 16 else 0, tiles * (6 if even else 14)
    return INSTRUCTIONS[form] * 32 * operands + products + step + (97 if launch.resident else 130 + NEWER)


def assert_shared_memory_is_as_planned(code: Compiled, planned: int) -> None:
    assert code.shared <= SHARED_MEMORY[CAPABILITY] and code.shared - 512 <= planned <= code.shared + 1024


def test_an_operand_that_is_written_too_early_is_found():
    products = ["HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24", "HGMMA.64x64x16 R24, R12, gdesc[UR4], R24, gsb0"]
    wait, other = "WARPGROUP.DEPBAR.LE gsb0, 0x1", ["HGMMA.64x64x16.F32 R24, R16, gdesc[UR4], R24, gsb0"]
    for early in ("LDS.128 R12, [R2]", "LDS.64 R7, [R2]", "HMUL2.BF16_V2 R15, R90, R91", "IMAD.WIDE R10, R2, R3, R4"):
        assert overwritten_operands([*products, early, wait], across=True) == [early] * 2
        assert not overwritten_operands([*products, *other, wait, early, *other, wait], across=True)
    reads = ["STS.128 [R9], R8", "LDS.64 R6, [R8]", "ISETP.NE P0, PT, R8, RZ, PT"]
    assert not overwritten_operands([*products, *reads], across=True)
    assert overwritten_operands(["MOV R8, R2", *products], across=True) == ["MOV R8, R2"]  # by the next turn
    assert not overwritten_operands(["MOV R8, R2", *products, wait.replace("0x1", "0x0")], across=False)


@pytest.mark.parametrize("launch, k, shared, dtype, kind, group", variants(Rows))
def test_a_launch_for_few_tokens_keeps_its_limits(launch, k, shared, dtype, kind, group):
    code = launched(launch, k, dtype, kind, group, n=4 * launch.rows)[0].compiled()
    if launch in SPILLS:
        assert code.stack <= SPILLS[launch]
    else:
        assert_no_spills(code)
    assert code.registers <= 128, "16 warps do not fit on a multiprocessor"
    assert_shared_memory_is_as_planned(code, launch.shared_memory)
    if shared:
        assert 2 * (code.shared + 1024) <= 228 << 10, "two programs do not fit on a multiprocessor"
    operands = launch.rows // 16 * launch.steps * (launch.stages if launch.resident else 1)
    assert count(code.loop, "LDG", ".128") == operands, "words are not loaded 16 bytes a lane"
    assert count(code.loop, "HMMA") == 4 * operands * launch.block_m // 8
    assert not count(code.loop, "SHFL"), "a decoded value crosses lanes"
    assert len(code.loop) <= most_instructions(launch, evenly(launch, k), (dtype, kind, group))


@pytest.mark.parametrize("launch, dtype, kind, group", variants(Stream))
def test_a_launch_for_more_tokens_keeps_its_limits(launch, dtype, kind, group):
    shared = replace(launch, programs=3, sharers=3)
    code, sums = (r.compiled() for r in launched(shared, 4096, dtype, kind, group, n=4 * launch.rows))
    assert_no_spills(sums)
    assert sums.registers <= 64 and sums.shared <= 16 << 10
    assert_no_spills(code)
    assert code.registers * 32 * (launch.num_warps + 4) <= 1 << 16, "the warp that copies is given those of four"
    unused = 0 if group == 16 else 2 * launch.stages * launch.tiles * launch.rows  # the plan is for either format
    assert_shared_memory_is_as_planned(code, launch.shared_memory - unused)
    assert code.loop and not count(code.loop, "SHFL"), "a decoded value crosses lanes"
    if launch.wgmma:
        products = count(code.instructions, "HGMMA")
        assert products and not code.has("HMMA")
        assert products >= 4 * count(code.instructions, "WARPGROUP.ARRIVE"), "a product waits for the one before"
        across = launch.overlap and launch.tiles == 2
        assert not overwritten_operands(code.loop, across=across), "a product still reads what is written"
    else:
        assert code.has("HMMA") and not code.has("HGMMA")


ODD = [
    case(launch, k, n, id=f"{n}-{named(launch)}", narrow=isinstance(launch, Stream) == (n == 70) and i % 4 == 0)
    for i, ((launch, _), (k, _)) in enumerate(LAUNCHES.items())
    if i % 7 == 0 or isinstance(launch, Stream)
    for n in (1, 70)
]


@pytest.mark.parametrize("launch, k, n", ODD)
def test_one_weight_row_and_an_odd_number_of_them_compile_too(launch, k, n):
    code = launched(launch, k, "bf16", "e4m3", 16, n)[0].compiled()
    assert code.loop and code.shared <= SHARED_MEMORY[CAPABILITY]
