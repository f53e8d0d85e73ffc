"""Weights that are stacks of matrices, and the order of rows in which experts are packed, as plain operations."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.passes.find.routes import Call, run

_PAIR = 8


def arranged(weight: FP4Weight, batch: int, order: Order | None) -> FP4Weight:
    """A weight whose matrices stand below each other, as a stack, its gates and ups in pairs if there is an order.

    Args:
        weight: ``[batch * n, k]``.
        batch: how many matrices there are; one is no stack.
        order: which rows are gates.
    """
    if batch == 1:
        return weight
    parts = {name: getattr(weight, name).unflatten(0, (batch, -1)) for name in ("codes", "scales", "multiplier")}
    if order is not None:
        parts = {name: paired(part, order).contiguous() for name, part in parts.items()}
    return replace(weight, **parts)


def paired(rows: Any, order: Order, call: Call = run) -> Any:
    """Rows ``[experts, 2 i, ...]`` in the order in which `kernels.experts.pack_experts` has them.

    Args:
        rows: the rows, or their node.
        order: which of them are gates.
        call: see `routes.Call`.
    """
    if order.startswith("interleaved"):
        units = call(torch.transpose, call(torch.unflatten, rows, 1, (-1, _PAIR, 2)), 2, 3)
    else:
        units = call(torch.transpose, call(torch.unflatten, rows, 1, (2, -1, _PAIR)), 1, 2)
    if order in ("up_gate", "interleaved_up_gate"):
        units = call(torch.flip, units, (2,))
    return call(torch.flatten, units, 1, 3)


def unpaired(columns: Tensor, order: Order) -> Tensor:
    """The inverse of `paired`, for columns ``[..., 2 i]``."""
    units = torch.unflatten(columns, -1, (-1, 2, _PAIR))
    units = units if order in ("interleaved", "gate_up") else units.flip(-2)
    units = units.transpose(-2, -1) if order.startswith("interleaved") else units.transpose(-3, -2)
    return units.flatten(-3)
