"""The packed weights of a mixture's experts."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order, packed_rows, places
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, empty_packed, pack, pack_into


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """The experts of a mixture as its kernels take them.

    Attributes:
        w13: the first product, ``[experts, rows, hidden]`` in the order of `pack_experts`.
        w2: the second, ``[experts, hidden, intermediate]``.
        activation: what stands between them.
        bias13, bias2: ``[experts, rows]`` in packed order and ``[experts, hidden]``, or None.
        weight_on_input: the routing weight multiplies the input (Llama 4) instead of the output.
    """

    w13: PackedFP4
    w2: PackedFP4
    activation: Activation
    bias13: Tensor | None = None
    bias2: Tensor | None = None
    weight_on_input: bool = False

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.w13.words)


def pack_experts(
    w13: FP4Weight | PackedFP4, w2: FP4Weight | PackedFP4, order: Order | str | None
) -> tuple[PackedFP4, PackedFP4]:
    """Packs the weights of a mixture's experts; what is packed already is returned as it is.

    Args:
        w13: the first product ``[experts, rows, hidden]``, with 2 i rows if gated, else i.
        w2: the second product ``[experts, hidden, columns]``: i in whole groups, those past i are never used.
        order: which rows of ``w13`` are gates; None if it has none.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if not isinstance(w13, PackedFP4):
        w13 = _pack_first(w13, w2.k, order)
    packed = w2 if isinstance(w2, PackedFP4) else pack(w2)
    if w13.words.ndim != 4 or packed.words.ndim != 4 or len(w13.words) != len(packed.words):
        found = f"{list(w13.multiplier.shape)} and {list(packed.multiplier.shape)} rows"
        raise ValueError(f"experts: found weights of {found}, expected one matrix of each for every expert")
    return w13, packed


def unpack_experts(
    w13: PackedFP4, w2: PackedFP4, order: Order | str | None, intermediate: int, name: str = "experts"
) -> tuple[FP4Weight, FP4Weight]:
    """The inverse of `pack_experts` for ``intermediate`` rows of each kind, bit for bit."""
    return unpack_first(w13, w2.k, order, intermediate, f"{name}.w13"), w2.unpack(f"{name}.w2")


def unpack_first(w13: PackedFP4, width: int, order: Order | str | None, intermediate: int, name: str) -> FP4Weight:
    """The first product of one expert or of all, its rows in their own order.

    Args:
        w13: as `pack_experts` makes it.
        width: columns of the second product.
        order, intermediate: see `unpack_experts`.
        name: what error messages call it.
    """
    paired = w13.unpack(name)
    back = places(intermediate, width, order).to(paired.codes.device)
    at = (slice(None),) * (paired.multiplier.ndim - 1) + (back,)
    return paired.derived(paired.codes[at], paired.scales[at], paired.multiplier[at])


def pack_bias(bias: Tensor, width: int, order: Order | str | None) -> Tensor:
    """The biases ``[experts, rows]`` of the first product in packed order, zeros beside the rows of zeros."""
    intermediate = bias.shape[-1] // (1 if order is None else 2)
    rows = packed_rows(intermediate, width, order).to(bias.device)
    return torch.where(rows >= 0, bias[:, rows.clamp(min=0)], 0)


def unpack_bias(bias: Tensor, intermediate: int, order: Order | str | None) -> Tensor:
    """The inverse of `pack_bias` for ``intermediate`` rows of each kind."""
    width = bias.shape[-1] // (1 if order is None else 2)
    return bias[:, places(intermediate, width, order).to(bias.device)]


def fit_each(weight: FP4Weight, *dtypes: torch.dtype) -> FP4Weight:
    """`FP4Weight.fit_first` of each matrix of a stack: one that the first dtype cannot hold changes no other.

    Raises:
        ValueError: see there.
    """
    with suppress(ValueError):
        return weight.fit(dtypes[0])
    parts = zip(weight.codes, weight.scales, weight.multiplier, strict=True)
    fitted = [weight.derived(*part).fit_first(*dtypes) for part in parts]
    codes, scales, multiplier = (
        torch.stack([getattr(one, field) for one in fitted]) for field in ("codes", "scales", "multiplier")
    )
    return weight.derived(codes, scales, multiplier)


def pack_first(
    parts: Iterable[FP4Weight], experts: int, width: int, order: Order | str | None, into: PackedFP4 | None = None
) -> PackedFP4:
    """Packs the first products of a mixture, some experts at a time: these may be let go before the next are made.

    Args:
        parts: of one expert each, or stacks of several, of 2 i rows if gated, else of i.
        experts: how many there are in all.
        width: columns of the second product: i, padded to whole groups.
        order: see `pack_experts`.
        into: what is packed over, at its addresses, or None for new tensors.
    """
    return _pack_parts(parts, experts, into, (width, order))


def pack_each(parts: Iterable[FP4Weight], experts: int, packed: PackedFP4 | None = None) -> PackedFP4:
    """Packs equal matrices, or stacks of some, into one stack, one part at a time; over ``packed``, if it is given.

    Raises:
        ValueError: they are not ``experts`` matrices, or differ in shape or format.
    """
    return _pack_parts(parts, experts, packed, None)


def _pack_parts(
    parts: Iterable[FP4Weight], experts: int, packed: PackedFP4 | None, placed: tuple[int, Order | str | None] | None
) -> PackedFP4:
    """See `pack_each`; ``placed`` are width and order of a first product."""
    count, rows = 0, None
    for part in parts:
        if placed is not None and rows is None:
            width, order = placed
            rows = packed_rows(part.n // (1 if order is None else 2), width, order).to(part.codes.device)
        packed = packed or empty_packed(part, part.n if rows is None else len(rows), (experts,))
        here = count if part.codes.ndim == 2 else slice(count, count + len(part.codes))
        pack_into(part, packed.matrix(here), rows)
        count += 1 if part.codes.ndim == 2 else len(part.codes)
        del part  # before the next is made
    if packed is None or count != experts:
        raise ValueError(f"experts: found {count} matrices, expected {experts}")
    return packed


def _pack_first(w13: FP4Weight, width: int, order: Order | str | None) -> PackedFP4:
    halves = 1 if order is None else 2
    intermediate = w13.n // halves
    if w13.codes.ndim != 3 or w13.n % halves or not 0 <= width - intermediate < 128:
        found = f"{list(w13.codes.shape[:-1])} rows"
        raise ValueError(
            f"{w13.name}: found {found}, expected [experts, {'2 i' if halves == 2 else 'i'}] for a second product of "
            f"{width} columns, which are i, padded to whole groups"
        )
    return pack_first((w13,), len(w13.codes), width, order)
