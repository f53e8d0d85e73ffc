"""How a weight is read from what it is computed from: a recipe gives an `FP4Weight` again for other live leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import E2M1_VALUES, FP4Weight, as_bytes, block_rows
from marlin_w4a16.kernels.quantize import encode, pack_nibbles, quantize_mxfp4
from marlin_w4a16.kernels.scale_bytes import ScaleKind
from marlin_w4a16.passes.judge import tensors
from marlin_w4a16.passes.judge.decode import Decode, Window
from marlin_w4a16.passes.judge.scales import to_e4m3, to_e8m0
from marlin_w4a16.passes.outcome import Rejected

Leaves = Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """A node whose value holds codes or scales.

    Attributes:
        node: its position among the nodes of the decode.
        coding: a row name of `CODINGS`, or of `SCALINGS`.
        blocks: it lies as ``[rows, columns]``: 0; or as so many blocks ``[columns, rows]`` below each other.
    """

    node: int
    coding: str
    blocks: int = 0

    def read_codes(self, decode: Decode, leaves: Leaves, window: Window, rows: list[int] | None = None) -> Tensor:
        """Codes as bytes ``[rows, k / 2]``: all of the weight, or some rows of it."""
        return self.codes_of(decode.source(self.node, leaves), decode, window, rows)

    def codes_of(self, value: Tensor, decode: Decode, window: Window, rows: list[int] | None = None) -> Tensor:
        """As `read_codes`, from the value of the node.

        Raises:
            ValueError: it holds no codes.
        """
        per_column, coding = CODINGS[self.coding]
        window = window if per_column == 2 else Window(0, decode.rows)
        shape = window.total, decode.matrices.k // per_column
        at = window.rows(decode.rows)
        matrix = self.matrix(value, *shape)[at] if rows is None else self.some_rows(value, *shape, window.at(rows))
        if per_column == 2:
            return coding(matrix)
        return torch.cat([coding(part) for part in torch.split(matrix, block_rows(decode.matrices.k))])

    def read_scales(self, decode: Decode, leaves: Leaves, window: Window, group: int) -> tuple[Tensor, Tensor | None]:
        """Scales as bytes ``[window.total, k / group]`` and their factor for each row, or None."""
        return self.scales_of(decode.source(self.node, leaves), decode, window, group)

    def scales_of(self, value: Tensor, decode: Decode, window: Window, group: int) -> tuple[Tensor, Tensor | None]:
        """As `read_scales`, from the value of the node.

        Raises:
            ValueError: it holds no block scales.
        """
        return SCALINGS[self.coding][1](self.matrix(value, window.total, decode.matrices.k // group))

    def matrix(self, value: Tensor, rows: int, columns: int) -> Tensor:
        """The value as ``[rows, columns]``, a view where that is possible."""
        value = as_bytes(value.detach())  # some 8-bit and 4-bit dtypes can be viewed but not indexed
        if not self.blocks:
            return value.reshape(rows, columns)
        return value.reshape(self.blocks, columns, rows // self.blocks).transpose(1, 2).reshape(rows, columns)

    def some_rows(self, value: Tensor, rows: int, columns: int, at: list[int]) -> Tensor:
        """Some rows of `matrix`, of which no more is copied."""
        if not self.blocks:
            return self.matrix(value, rows, columns)[at]
        each = rows // self.blocks
        blocks = as_bytes(value.detach()).reshape(self.blocks, columns, each).transpose(1, 2)
        return blocks[[row // each for row in at], [row % each for row in at]]


@dataclass(frozen=True, slots=True)
class Factor:
    """A node or a number by which a weight is multiplied, or divided.

    Attributes:
        node: position of the node, one value or one for each of equal parts of the rows; or None.
        number: the number, where there is no node.
        divides: it is a divisor.
    """

    node: int | None = None
    number: float = 1.0
    divides: bool = False

    def value(self, decode: Decode, leaves: Leaves, window: Window, device: torch.device) -> Tensor:
        """What the model holds, in float32, for each row of the window."""
        if self.node is None:
            return torch.full((decode.rows,), self.number, device=device)
        value = decode.source(self.node, leaves).detach().to(device, torch.float32).reshape(-1)
        spread = value.repeat_interleave(window.total // value.numel())
        return spread[window.rows(decode.rows)]

    def some_rows(self, value: Tensor, window: Window, rows: list[int]) -> Tensor:
        """As `value` for some rows, from the value of the node."""
        each = window.total // value.numel()
        return value.detach().reshape(-1)[[row // each for row in window.at(rows)]].float()


def _swapped(value: Tensor) -> Tensor:
    codes = as_bytes(value)
    return (codes << 4) | (codes >> 4)


def _numbers(value: Tensor) -> Tensor:
    codes = value.to(torch.uint8)
    if bool(((codes != value) | (codes > 15)).any()):
        raise ValueError("not codes")
    return pack_nibbles(codes)


def _values(value: Tensor) -> Tensor:
    codes = encode(value) | (value.signbit().to(torch.uint8) << 3)
    if bool((value != torch.tensor(E2M1_VALUES, device=value.device)[codes.int() & 15]).any()):
        raise ValueError("not values of E2M1")
    return pack_nibbles(codes)


# How codes stand in a tensor: how many a column, and to bytes [rows, k / 2], the even column in the low nibble.
CODINGS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "low nibble first": (2, as_bytes),
    "high nibble first": (2, _swapped),
    "a number each": (1, _numbers),
    "a value each": (1, _values),
}
# How block scales stand in a tensor: their kind, and to bytes and a factor for each row or None.
SCALINGS: dict[str, tuple[ScaleKind, Callable[[Tensor], tuple[Tensor, Tensor | None]]]] = {
    "e4m3 bytes": ("e4m3", lambda scales: (as_bytes(scales), None)),
    "e8m0 bytes": ("e8m0", lambda scales: (as_bytes(scales), None)),
    "e4m3 floats": ("e4m3", to_e4m3),
    "e8m0 floats": ("e8m0", to_e8m0),
}


@dataclass(frozen=True, slots=True)
class FromSources:
    """Codes, scales and factor stand in tensors of the graph."""

    codes: Source
    scales: Source
    factor: Factor
    window: Window
    group: int

    @property
    def kind(self) -> ScaleKind:
        """As in `FP4Weight`."""
        return SCALINGS[self.scales.coding][0]

    def read(self, decode: Decode, leaves: Leaves, name: str) -> tuple[FP4Weight, Tensor]:
        """The weight in canonical form, and the model's own factor of each row.

        Raises:
            ValueError: the leaves hold no such weight (a NaN scale, a shape that does not fit).
        """
        rows = self.window.rows(decode.rows)
        codes = self.codes.read_codes(decode, leaves, self.window)
        scales, own = self.scales.read_scales(decode, leaves, self.window, self.group)
        factor = self.factor.value(decode, leaves, self.window, codes.device)
        multiplier = factor.reciprocal() if self.factor.divides else factor
        if own is not None:
            factor, multiplier = factor * own[rows], multiplier * own[rows]
        contiguous = codes.contiguous(), scales[rows].contiguous(), multiplier.contiguous()
        return FP4Weight(*contiguous, self.kind, self.group, name), factor

    def roots(self, decode: Decode) -> list[int]:
        """The leaves, by their positions, that it is read from: in one order, however a graph met them."""
        return list(dict.fromkeys(root for node in self._nodes for root in decode.roots(node)))

    def reading(self, decode: Decode) -> Any:
        """How it is read from its `roots`: what the recipes of two decodes have in common if they read alike."""
        roots = self.roots(decode)
        which = [(decode.expression(node), [roots.index(root) for root in decode.roots(node)]) for node in self._nodes]
        how = (self.codes.coding, self.codes.blocks, self.scales.coding, self.scales.blocks, self.factor.number)
        return repr((which, how, self.factor.divides, self.window, self.group, decode.rows))

    @property
    def _nodes(self) -> list[int]:
        return [node for node in (self.codes.node, self.scales.node, self.factor.node) if node is not None]


@dataclass(frozen=True, slots=True)
class OfType:
    """A tensor of a class that is an FP4 weight."""

    leaf: int
    kind: ScaleKind
    group: int

    def read(self, decode: Decode, leaves: Leaves, name: str) -> tuple[FP4Weight, Tensor]:
        """See `FromSources.read`."""
        weight = tensors.read(leaves[self.leaf], name)
        if isinstance(weight, Rejected):
            raise ValueError(weight.reason)
        if (weight.n, weight.k) != (decode.rows, decode.matrices.k):
            part, whole = f"[{decode.rows}, {decode.matrices.k}]", f"[{weight.n}, {weight.k}]"
            raise ValueError(f"its product reads a part {part} of a tensor {whole}, which is read as a whole only")
        return weight, weight.multiplier

    def roots(self, decode: Decode) -> list[int]:
        """See `FromSources.roots`."""
        return [self.leaf]

    def reading(self, decode: Decode) -> Any:
        """See `FromSources.reading`."""
        return "type", decode.rows, decode.matrices.k


@dataclass(frozen=True, slots=True)
class FromValue:
    """The values of a dense weight are MXFP4: groups of 32 and powers of two can be told from them."""

    kind: ScaleKind = "e8m0"
    group: int = 32

    def read(self, decode: Decode, leaves: Leaves, name: str) -> tuple[FP4Weight, Tensor]:
        """See `FromSources.read`; the nearest MXFP4 weight, which need not be the same."""
        value = decode.weight(leaves).detach()
        parts = [quantize_mxfp4(part, self.group, name) for part in torch.split(value, block_rows(value.shape[1]))]
        codes, scales = (torch.cat([getattr(part, field) for part in parts]) for field in ("codes", "scales"))
        one = torch.ones(decode.rows, device=value.device)
        return FP4Weight(codes, scales, one, self.kind, self.group, name), one

    def roots(self, decode: Decode) -> list[int]:
        """See `FromSources.roots`."""
        return list(range(len(decode.leaves)))

    def reading(self, decode: Decode) -> Any:
        """See `FromSources.reading`."""
        return "value", decode.signature


@dataclass(frozen=True, slots=True)
class Joined:
    """Parts below each other (axis 0) or beside each other (axis 1), each with a recipe of its own."""

    parts: "tuple[Recipe, ...]"
    axis: int

    @property
    def kind(self) -> ScaleKind:
        """As in `FP4Weight`."""
        return self.parts[0].kind

    @property
    def group(self) -> int:
        """As in `FP4Weight`."""
        return self.parts[0].group

    def read(self, decode: Decode, leaves: Leaves, name: str) -> tuple[FP4Weight, Tensor]:
        """See `FromSources.read`."""
        read = [
            recipe.read(part, [leaves[i] for i in decode.places(part.leaves)], name)
            for part, recipe in zip(decode.parts[1], self.parts, strict=True)
        ]
        weights, factors = [weight for weight, _ in read], [factor for _, factor in read]
        codes, scales = (torch.cat([getattr(w, field) for w in weights], self.axis) for field in ("codes", "scales"))
        multipliers = [weight.multiplier for weight in weights]
        if self.axis == 1:
            if any(not torch.equal(multiplier, multipliers[0]) for multiplier in multipliers):
                found = "found parts with different factors beside each other"
                raise ValueError(f"{name}: {found}, expected one factor a row")
            multipliers, factors = multipliers[:1], factors[:1]
        return FP4Weight(codes, scales, torch.cat(multipliers), self.kind, self.group, name), torch.cat(factors)

    def roots(self, decode: Decode) -> list[int]:
        """See `FromSources.roots`."""
        return sorted({root for roots in self._roots(decode) for root in roots})

    def reading(self, decode: Decode) -> Any:
        """See `FromSources.reading`."""
        place = {root: place for place, root in enumerate(self.roots(decode))}
        return self.axis, *(
            (recipe.reading(part), *map(place.__getitem__, roots))
            for part, recipe, roots in zip(decode.parts[1], self.parts, self._roots(decode), strict=True)
        )

    def _roots(self, decode: Decode) -> list[list[int]]:
        """The roots of each part, as leaves of the whole."""
        of_parts = zip(decode.parts[1], self.parts, strict=True)
        return [decode.places([part.leaves[i] for i in recipe.roots(part)]) for part, recipe in of_parts]


Recipe = FromSources | OfType | FromValue | Joined
