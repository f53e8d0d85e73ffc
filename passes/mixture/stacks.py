"""Weights that are stacks of matrices, and the order of rows in which experts are packed, as plain operations."""

from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.expert_order import PAIR, Order
from marlin_w4a16.kernels.experts import pack_first
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack, pack_into
from marlin_w4a16.passes.find.routes import Call, at_once


def pack_stack(weight: FP4Weight, batch: int, order: Order | None, into: PackedFP4 | None = None) -> PackedFP4:
    """Packs a weight whose matrices stand below each other, its gates and ups in pairs if there is an order.

    Args:
        weight: ``[batch * n, k]``.
        batch: how many matrices there are; one is no stack.
        into: what is packed over, at its addresses, or None for new tensors.
    """
    if batch > 1:
        parts = (torch.unflatten(tensor, 0, (batch, -1)) for tensor in (weight.codes, weight.scales, weight.multiplier))
        weight = weight.derived(*parts)
        if order is not None:
            return pack_first((weight,), batch, weight.n // 2, order, into)
    if into is None:
        return pack(weight)
    pack_into(weight, into)
    return into


def paired(rows: Any, order: Order, call: Call = at_once) -> Any:
    """Rows ``[experts, 2 i, ...]``, or their node, in the order in which `kernels.experts.pack_experts` has them."""
    if order.interleaved:
        units = call(torch.transpose, call(torch.unflatten, rows, 1, (-1, PAIR, 2)), 2, 3)
    else:
        units = call(torch.transpose, call(torch.unflatten, rows, 1, (2, -1, PAIR)), 1, 2)
    if order.up_first:
        units = call(torch.flip, units, (2,))
    return call(torch.flatten, units, 1, 3)


def unpaired(columns: Tensor, order: Order) -> Tensor:
    """The inverse of `paired`, for columns ``[..., 2 i]``."""
    units = torch.unflatten(columns, -1, (-1, 2, PAIR))
    units = units.flip(-2) if order.up_first else units
    units = units.transpose(-2, -1) if order.interleaved else units.transpose(-3, -2)
    return units.flatten(-3)
