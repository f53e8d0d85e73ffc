"""The kernel that packs, in Triton's interpreter: bit for bit what plain torch makes."""

from itertools import product

import pytest
import torch

from kernels.machine import assert_no_spills, compiled
from kernels.portable.limits import OWN
from marlin_w4a16.kernels.expert_order import ORDERS, packed_rows
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import empty_packed, pack_into
from marlin_w4a16.kernels.packing import _TILES, _pack_kernel

FORMATS = list(product(["e4m3", "e8m0"], [16, 32]))
every_format = pytest.mark.parametrize("kind, group", FORMATS)


def draw(n: int, k: int, kind: str, group: int, *lead: int) -> FP4Weight:
    """Any codes, and every scale byte, NaN too: nothing is computed with them here."""
    torch.manual_seed(n + k)
    codes, scales = (torch.randint(256, (*lead, n, k // part), dtype=torch.uint8) for part in (2, group))
    scales.view(-1)[:256] = torch.arange(256)[: scales.numel()].to(torch.uint8)
    return FP4Weight.unchecked(codes, scales, torch.randn(*lead, n), kind, group)


def check(interpret, *cases: tuple[FP4Weight, torch.Tensor | None]) -> None:
    sizes = [weight.n if rows is None else len(rows) for weight, rows in cases]
    found = interpret(*(("packed_by_the_kernel", (w, n, rows)) for (w, rows), n in zip(cases, sizes, strict=True)))
    for (words, scales), (weight, rows), n in zip(found, cases, sizes, strict=True):
        expected = empty_packed(weight, n)
        pack_into(weight, expected, rows)
        assert torch.equal(words, expected.words) and torch.equal(scales, expected.scales)


@every_format
def test_matrices_of_odd_sizes(kind, group, interpret):
    shapes = [(1, 32), (65, 96), (64, 64), (70, 160), (130, 320)]
    check(interpret, *((draw(n, k, kind, group), None) for n, k in shapes))


@every_format
def test_stacks_with_their_rows_in_every_order(kind, group, interpret):
    cases = []
    for experts, order, (intermediate, width) in zip(
        (3, 1, 3, 2, 3), (None, *ORDERS), ((40, 64), (64, 64), (20, 32), (33, 64), (96, 96)), strict=True
    ):
        rows = packed_rows(intermediate, width, order)
        cases.append((draw(int(rows.max()) + 1, 96, kind, group, experts), rows))
    check(interpret, *cases)


def test_codes_and_scales_of_any_strides(interpret):
    wide = draw(70, 192, "e4m3", 16, 2)
    strided = FP4Weight.unchecked(
        wide.codes[:, ::2, ::2], wide.scales[:, ::2, ::2], wide.multiplier[:, ::2], "e4m3", 16
    )
    turned = FP4Weight.unchecked(
        wide.codes.mT.contiguous().mT, wide.scales.mT.contiguous().mT, wide.multiplier, "e4m3", 16
    )
    check(interpret, (strided, None), (turned, None))


@pytest.mark.parametrize("capability", OWN)
@pytest.mark.parametrize("kind, group, mapped", [("e4m3", 16, True), ("e8m0", 32, True), ("e4m3", 32, False)])
def test_the_kernel_is_small(capability, kind, group, mapped):
    pointers = {"codes": "*u8", "scales": "*u8", "rows": "*i64" if mapped else "*u8", "words": "*i32", "tiles": "*u8"}
    constants = dict(PAD=127, SIGNED=kind == "e4m3", GROUP=group, MAPPED=mapped, TILES=_TILES)
    columns = dict(code_column=1, scale_column=1)
    code = compiled(capability, _pack_kernel, pointers, constants | columns, num_warps=4)
    assert_no_spills(code)
    assert code.registers <= 96 and code.shared <= 1 << 10 and not code.has("SHFL")
    words = [i for i in code.instructions if i.startswith("STG.E.128")]
    assert len(words) == _TILES, "a lane writes its four words at once"
    assert len(code.instructions) <= 100 * 4 * _TILES
