"""Stacks of matrices are packed as experts are, and rows are put in pairs as `kernels.expert_order` has them."""

import pytest
import torch

from marlin_w4a16.kernels.expert_order import ORDERS, packed_rows
from marlin_w4a16.kernels.experts import pack_experts
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.passes.mixture.stacks import pack_stack, paired, unpaired

EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)


def weight(rows: int, kind: str = "e4m3", group: int = 16) -> FP4Weight:
    codes, scales = torch.randint(256, (rows, 32)), torch.randint(0x7F, (rows, 64 // group))
    return FP4Weight(codes.to(torch.uint8), scales.to(torch.uint8), torch.rand(rows), kind, group)


def tensors(packed) -> list[list]:
    return [t.tolist() for t in (packed.words, packed.scales, packed.multiplier)]


@EVERY_ORDER
@pytest.mark.parametrize("intermediate", [8, 16, 48])
def test_pairs_are_those_of_packed_rows_and_back(order, intermediate):
    rows = torch.randn(3, 2 * intermediate, 5)
    found = paired(rows, order)
    assert torch.equal(found, rows[:, packed_rows(intermediate, intermediate, order)])
    assert torch.equal(unpaired(found.mT, order), rows.mT)


@EVERY_ORDER
@pytest.mark.parametrize("kind, group", [("e4m3", 16), ("e8m0", 32)])
def test_a_stack_is_packed_as_experts_are_and_again_at_the_same_address(order, kind, group):
    one, other = weight(3 * 64, kind, group), weight(3 * 64, kind, group)
    into = pack_stack(other, 3, order)
    addresses = [t.data_ptr() for t in (into.words, into.scales, into.multiplier)]
    assert pack_stack(one, 3, order, into) is into
    assert [t.data_ptr() for t in (into.words, into.scales, into.multiplier)] == addresses
    stack = FP4Weight(one.codes.view(3, 64, -1), one.scales.view(3, 64, -1), one.multiplier.view(3, 64), kind, group)
    second = FP4Weight(stack.codes[..., :16], stack.scales[..., : 32 // group], stack.multiplier, kind, group)
    assert tensors(into) == tensors(pack_stack(one, 3, order)) == tensors(pack_experts(stack, second, order)[0])


def test_without_an_order_rows_stay_where_they_are():
    one, other = weight(96), weight(96)
    stack = FP4Weight(one.codes.view(3, 32, -1), one.scales.view(3, 32, -1), one.multiplier.view(3, 32), "e4m3", 16)
    for batch, expected in ((3, pack(stack)), (1, pack(one))):
        into = pack_stack(other, batch, None)
        assert tensors(pack_stack(one, batch, None)) == tensors(pack_stack(one, batch, None, into)) == tensors(expected)
