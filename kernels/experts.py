"""What an expert of a mixture computes between its two products, and the order in which its rows are packed.

The first product of a gated expert has gate and up rows. Packed, they stand in pairs of eight: row ``16 j + g`` is gate
``8 j + g`` and row ``16 j + 8 + g`` is up ``8 j + g`` (g < 8). These are the rows r = 0 and 1 of one lane in a fragment
(layout.py), so that the kernel has both in one thread when its sums are done. What stands between the products is
padded to whole groups of the second one, with rows of zeros.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PAD_SCALE, PackedFP4, empty_packed, pack, pack_into

# Which rows of the first product are gates: the first half, the last half, the even ones, the odd ones.
Order = Literal["gate_up", "up_gate", "interleaved", "interleaved_up_gate"]
ORDERS: tuple[Order, ...] = get_args(Order)
Function = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)
_PAIR = 8


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between the two products of an expert, in float32: ``function(gate) * (up + up_offset)``.

    Attributes:
        function: ``silu`` is ``z * sigmoid(alpha * z)``, ``relu2`` the square of relu.
        gated: whether there are gates; otherwise it is ``function(z)`` of all rows.
        alpha: of silu: 1.702 in gpt-oss.
        gate_limit: gates (or z) are at most this; None for no limit.
        up_limit: ups are within plus and minus this; None for no limit.
        up_offset: what is added to the clamped ups: 1 in gpt-oss.
    """

    function: Function = "silu"
    gated: bool = True
    alpha: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """The activation of gates and ups of one shape, or of z alone, in their dtype."""
        z = gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)
        value = self._function(z)
        if up is None:
            return value
        if self.up_limit is not None:
            up = up.clamp(-self.up_limit, self.up_limit)
        return value * (up + self.up_offset)

    def _function(self, z: Tensor) -> Tensor:
        if self.function == "silu":
            return z * torch.sigmoid(self.alpha * z)
        if self.function.startswith("gelu"):
            return torch.nn.functional.gelu(z, approximate="tanh" if self.function == "gelu_tanh" else "none")
        rectified = torch.relu(z)
        return rectified * rectified if self.function == "relu2" else rectified

    def of_rows(self, sums: Tensor) -> Tensor:
        """The activation of sums ``[..., rows]`` whose rows are packed as above: ``[..., rows / 2]`` if gated."""
        if not self.gated:
            return self(sums)
        gate, up = _unpaired(sums)
        return self(gate, up).flatten(-2)

    def gradient_of_rows(self, grad: Tensor, sums: Tensor) -> Tensor:
        """The gradient of the sums of `of_rows`; in closed form, since autograd does not run inside of an op."""
        gate, up = _unpaired(sums) if self.gated else (sums, None)
        z = gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)
        slope = self._slope(z)
        if self.gate_limit is not None:
            slope = slope * (gate <= self.gate_limit)
        if up is None:
            return grad * slope
        grad = grad.unflatten(-1, (-1, _PAIR))
        limited = up if self.up_limit is None else up.clamp(-self.up_limit, self.up_limit)
        of_gate, of_up = grad * slope * (limited + self.up_offset), grad * self._function(z)
        if self.up_limit is not None:
            of_up = of_up * (up.abs() <= self.up_limit)
        return torch.stack((of_gate, of_up), -2).flatten(-3)

    def _slope(self, z: Tensor) -> Tensor:
        if self.function == "silu":
            share = torch.sigmoid(self.alpha * z)
            return share * (1 + self.alpha * z * (1 - share))
        if self.function.startswith("gelu"):
            approximate = "tanh" if self.function == "gelu_tanh" else "none"
            slope: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate=approximate)
            return slope
        return 2 * torch.relu(z) if self.function == "relu2" else (z > 0).to(z.dtype)

    def __str__(self) -> str:
        """For people: ``silu(gate <= 7, 1.702) * (up in +-7 + 1)``."""
        of = ["gate" if self.gated else "z"]
        if self.gate_limit is not None:
            of[0] += f" <= {self.gate_limit:g}"
        if self.alpha != 1:
            of.append(f"{self.alpha:g}")
        up = "up" if self.up_limit is None else f"up in +-{self.up_limit:g}"
        up = f"({up} + {self.up_offset:g})" if self.up_offset else up
        return f"{self.function}({', '.join(of)})" + (f" * {up}" if self.gated else "")


def _unpaired(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and ups ``[..., rows / 16, 8]`` of packed rows."""
    gate, up = sums.unflatten(-1, (-1, 2, _PAIR)).unbind(-2)
    return gate, up


def pack_experts(
    w13: FP4Weight | PackedFP4, w2: FP4Weight | PackedFP4, order: Order | None
) -> tuple[PackedFP4, PackedFP4]:
    """Packs the weights of a mixture's experts, one expert at a time; what is packed already is returned as it is.

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
    w13: PackedFP4, w2: PackedFP4, order: Order | None, intermediate: int, name: str = "experts"
) -> tuple[FP4Weight, FP4Weight]:
    """The inverse of `pack_experts` for ``intermediate`` rows of each kind, bit for bit."""
    return unpack_first(w13, w2.k, order, intermediate, f"{name}.w13"), w2.unpack(f"{name}.w2")


def unpack_first(w13: PackedFP4, width: int, order: Order | None, intermediate: int, name: str) -> FP4Weight:
    """The first product of one expert or of all, its rows in their own order.

    Args:
        w13: as `pack_experts` makes it.
        width: columns of the second product.
        order, intermediate: see `unpack_experts`.
        name: what error messages call it.
    """
    paired = w13.unpack(name)
    back = _places(intermediate, width, order).to(paired.codes.device)
    at = (slice(None),) * (paired.multiplier.ndim - 1) + (back,)
    return paired.derived(paired.codes[at], paired.scales[at], paired.multiplier[at])


def _places(intermediate: int, width: int, order: Order | None) -> Tensor:
    """The packed row at which each row of the first product stands."""
    rows = packed_rows(intermediate, width, order)
    return torch.where(rows < 0, len(rows), rows).argsort()[: intermediate * (1 if order is None else 2)]


def packed_rows(intermediate: int, width: int, order: Order | None) -> Tensor:
    """The row of the first product that stands at each packed row, -1 where one of zeros does.

    Args:
        intermediate: gates, or rows of a product that has none.
        width: what that is padded to.
        order: see `pack_experts`.
    """
    at = torch.arange(width if order is None else 2 * width)
    if order is None:
        return torch.where(at < intermediate, at, -1)
    unit, up = at // (2 * _PAIR) * _PAIR + at % _PAIR, at // _PAIR % 2
    if order.startswith("interleaved"):
        row = 2 * unit + (up if order == "interleaved" else 1 - up)
    else:
        row = unit + (up if order == "gate_up" else 1 - up) * intermediate
    return torch.where(unit < intermediate, row, -1)


def pack_bias(bias: Tensor, width: int, order: Order | None) -> Tensor:
    """The biases ``[experts, rows]`` of the first product in packed order, zeros beside the rows of zeros."""
    intermediate = bias.shape[-1] // (1 if order is None else 2)
    rows = packed_rows(intermediate, width, order).to(bias.device)
    return torch.where(rows >= 0, bias[:, rows.clamp(min=0)], 0)


def unpack_bias(bias: Tensor, intermediate: int, order: Order | None) -> Tensor:
    """The inverse of `pack_bias` for ``intermediate`` rows of each kind."""
    width = bias.shape[-1] // (1 if order is None else 2)
    return bias[:, _places(intermediate, width, order).to(bias.device)]


def pack_first(parts: Iterable[FP4Weight], experts: int, width: int, order: Order | None) -> PackedFP4:
    """Packs the first products of a mixture, one expert at a time: each may be let go before the next is made.

    Args:
        parts: one for each expert, of 2 i rows if gated, else of i.
        experts: how many there are.
        width: columns of the second product: i, padded to whole groups.
        order: see `pack_experts`.
    """

    def placed(part: FP4Weight) -> FP4Weight:
        return _placed(part, packed_rows(part.n // (1 if order is None else 2), width, order))

    return pack_each(map(placed, parts), experts)


def pack_each(parts: Iterable[FP4Weight], experts: int) -> PackedFP4:
    """Packs equal matrices into one stack, one at a time.

    Raises:
        ValueError: there are fewer than ``experts``, or they differ in shape or format.
    """
    packed, count = None, 0
    for part in parts:
        packed = packed or empty_packed(part, part.n, experts)
        pack_into(part, packed.matrix(count))
        count += 1
    if packed is None or count != experts:
        raise ValueError(f"experts: found {count} matrices, expected {experts}")
    return packed


def _pack_first(w13: FP4Weight, width: int, order: Order | None) -> PackedFP4:
    halves = 1 if order is None else 2
    intermediate = w13.n // halves
    if w13.codes.ndim != 3 or w13.n % halves or not 0 <= width - intermediate < 128:
        found = f"{list(w13.codes.shape[:-1])} rows"
        raise ValueError(
            f"{w13.name}: found {found}, expected [experts, {'2 i' if halves == 2 else 'i'}] for a second product of "
            f"{width} columns, which are i, padded to whole groups"
        )
    rows = packed_rows(intermediate, width, order)
    packed = empty_packed(w13, len(rows))
    for expert, part in enumerate(w13.matrices()):
        pack_into(_placed(part, rows), packed.matrix(expert))
    return packed


def _placed(part: FP4Weight, rows: Tensor) -> FP4Weight:
    """A matrix with its rows where they are packed, and rows of zeros between them."""
    rows = rows.to(part.codes.device)
    empty, rows = (rows < 0)[:, None], rows.clamp(min=0)
    codes = torch.where(empty, 0, part.codes[rows])
    scales = torch.where(empty, PAD_SCALE[part.kind], part.scales[rows])
    multiplier = torch.where(empty[:, 0], 0, part.multiplier[rows])
    return part.derived(codes, scales, multiplier)
