"""Dense weights of stored ones: exact, rounded once, with what a linear computes beside its product."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from marlin_w4a16.checkpoints.storage import LOW_RANK, FP4Storage
from marlin_w4a16.kernels.fp4 import FP4Weight, round_once


@dataclass(frozen=True, slots=True)
class Beside:
    """What a linear computes beside the product with its FP4 weight.

    Attributes:
        columns: factors of the input (AWQ), or None.
        rotation: a matrix by which each block of the input is multiplied (FP-Quant), or None.
        low_rank: matrices ``[r, k]`` and ``[n, r]`` whose product is added to the weight (SVDQuant), or none.
    """

    columns: Tensor | None = None
    rotation: Tensor | None = None
    low_rank: tuple[Tensor, ...] = ()


def beside(storage: FP4Storage, tensors: Mapping[str, Tensor]) -> Beside:
    """What tensors by leaf say of that."""
    parts = {part.role: tensors[part.leaf] for part in storage.parts if part.leaf in tensors}
    return Beside(
        parts.get("pre-quant scale"), parts.get("rotation"), tuple(parts[role] for role in LOW_RANK if role in parts)
    )


def decoded(weight: FP4Weight, dtype: torch.dtype, more: Beside = Beside()) -> Tensor:
    """The exact weight ``[n, k]`` with what is beside it, rounded once; made in blocks of rows."""
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.codes.device)
    for rows, part in weight.row_blocks():
        exact = part.decode()
        if more.low_rank:
            a, b = (matrix.double() for matrix in more.low_rank)
            exact += b[rows] @ a
        if more.rotation is not None:  # of the input is one of the weight by its transpose
            exact = rotated(exact, more.rotation.T)
        if more.columns is not None:
            exact *= more.columns.double()
        out[rows] = round_once(exact, dtype)
    return out


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """Each block of ``x`` times a square matrix, in the dtype of ``x``."""
    blocks: Tensor = x.unflatten(-1, (-1, matrix.shape[0]))
    return (blocks @ matrix.to(x.dtype)).flatten(-2)


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A dense linear around existing tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    linear.bias = bias  # type: ignore[assignment]
    return linear


def joined(parts: Sequence[FP4Weight]) -> FP4Weight:
    """Matrices of one format below each other, or those of stacks."""
    if len(parts) == 1:
        return parts[0]
    fields = (("codes", -2), ("scales", -2), ("multiplier", -1))
    codes, scales, multiplier = (torch.cat([getattr(part, field) for part in parts], axis) for field, axis in fields)
    return parts[0].derived(codes, scales, multiplier)
