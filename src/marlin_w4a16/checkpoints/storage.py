"""How one quantised weight is stored: its tensors, their dtypes and shapes, and which way they decode."""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.kernels.fp4 import FP4Weight, format_name, fp4_weight
from marlin_w4a16.kernels.inputs import Rounding
from marlin_w4a16.kernels.scale_bytes import ScaleKind, e8m0_values, scale_bytes

FLOATS = ("F32", "BF16", "F16")
STORED_SCALES: dict[ScaleKind, tuple[str, ...]] = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
Role = Literal[
    "codes", "scales", "multiplier", "divisor", "input multiplier", "input divisor", "pre-quant scale", "low rank a",
    "low rank b",
]  # fmt: skip
# What the weight is not decoded with: it need not be there, nor hold numbers, unless inputs are quantised.
OF_INPUTS: tuple[Role, ...] = ("input multiplier", "input divisor")
LOW_RANK: tuple[Role, ...] = ("low rank a", "low rank b")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a stored weight.

    Attributes:
        leaf: the last part of its name.
        role: what it is. Global scales multiply or divide; those of the input belong to W4A4; a pre-quant scale
            multiplies the input before the product (AWQ); ``x a.T b.T`` is added to it (SVDQuant).
        dtypes: as safetensors names them.
        shape: axes as ``e`` (experts), ``n``, ``k``, ``k/2``, ``k/g``, ``g/2`` and ``r`` (any rank); empty for one
            element.
        optional: may be missing.
        aliases: other names of it.
    """

    leaf: str
    role: Role
    dtypes: tuple[str, ...]
    shape: tuple[str, ...] = ()
    optional: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Activations:
    """How the producer quantises a linear's input.

    Attributes:
        told: for people.
        kind: of block scales that are computed from the input in each call, or None: not FP4.
        group: elements that share one; 0: as many as in the weight.
        rounding: how the producer rounds E8M0 scales.
    """

    told: str
    kind: ScaleKind | None = None
    group: int = 0
    rounding: Rounding = "near"


@dataclass(frozen=True, slots=True)
class FP4Storage:
    """A linear whose weight is FP4, or the same weight of every expert in one tensor.

    Attributes:
        label: the producer's name for the format.
        kind: how its scale bytes are read.
        groups: columns that may share a scale; which, the shapes say.
        parts: its tensors.
        activations: how its input is quantised, or None.
        joint: what stands between a path and a leaf.
        stacked: whether it is of every expert: its codes are ``[e, n, k/g, g/2]`` then, or ``[e, k/2, n]``.
        transposed: whether they, and the scales, are of the latter shape.
    """

    label: str
    kind: ScaleKind
    groups: tuple[int, ...]
    parts: tuple[Part, ...]
    activations: Activations | None = None
    joint: str = "."
    stacked: bool = False
    transposed: bool = False
    big: ClassVar[tuple[Role, ...]] = ("codes", "scales")  # what becomes the weight

    def named(self, leaves: Container[str]) -> "FP4Storage":
        """With the names that a weight has for its tensors, of those that they may have."""
        found = [next((a for a in (part.leaf, *part.aliases) if a in leaves), part.leaf) for part in self.parts]
        parts = tuple(replace(part, leaf=leaf) for part, leaf in zip(self.parts, found, strict=True))
        return self if parts == self.parts else replace(self, parts=parts)

    def of_stack(self) -> "FP4Storage":
        """As ModelOpt stores all experts of a transposed projection (Llama-4, gpt-oss): codes bear the path itself."""
        parts = []
        for part in self.parts:
            name = "" if part.role == "codes" else part.leaf
            shape = ("e", *part.shape[::-1]) if part.role in self.big else part.shape
            parts.append(replace(part, leaf=name, shape=shape))
        return replace(self, parts=tuple(parts), joint="_", stacked=True, transposed=True)

    def part(self, *roles: Role) -> Part | None:
        """The tensor that plays one of some roles."""
        return next((part for part in self.parts if part.role in roles), None)

    def leaf(self, *roles: Role) -> str:
        """The name of a tensor that every linear has."""
        part = self.part(*roles)
        if part is None:
            raise KeyError(roles)
        return part.leaf

    @property
    def scales(self) -> str:
        """The shape of block scales in words."""
        groups = f"k / {' or '.join(map(str, self.groups))}"
        return f"[{'experts, ' * self.stacked}{f'{groups}, n' if self.transposed else f'n, {groups}'}]"

    def shape_of(self, entries: Mapping[str, Entry]) -> tuple[int, int, int] | None:
        """Rows, columns and group size by the shapes of codes and scales, or None: they make no linear."""
        codes, scales = entries[self.leaf("codes")].shape, entries[self.leaf("scales")].shape
        if self.transposed:
            codes, scales = codes[:0:-1], scales[:0:-1]
        elif self.stacked:
            codes, scales = (*codes[1:2], math.prod(codes[2:])), scales[1:]
        if len(codes) != 2 or len(scales) != 2 or not scales[1] or codes[1] * 2 % scales[1]:
            return None
        group = codes[1] * 2 // scales[1]
        return (codes[0], codes[1] * 2, group) if group in self.groups else None

    def fits(self, part: Part, shape: tuple[int, ...], axes: Mapping[str, int]) -> bool:
        """Whether a tensor has its shape."""
        if not part.shape:
            return math.prod(shape) == 1 or (self.stacked and shape == (axes["e"],))
        wanted = tuple(axes.get(axis, found) for axis, found in zip(part.shape, shape, strict=False))
        return len(shape) == len(part.shape) and shape == wanted

    def format(self, group: int) -> str:
        """The name of the format for people."""
        return format_name(self.kind, group)

    def read(self, tensors: Mapping[str, Tensor], name: str) -> FP4Weight:
        """The weight that some tensors, by leaf, are."""
        part = self.part("multiplier", "divisor")
        factor: Tensor | float = 1.0 if part is None else tensors[part.leaf].float()
        if part is not None and part.role == "divisor":
            factor = torch.as_tensor(factor).reciprocal()
        codes, scales = tensors[self.leaf("codes")], tensors[self.leaf("scales")]
        if self.transposed:  # one expert of them
            codes, scales = codes.T.contiguous(), scales.T.contiguous()
        elif self.stacked:
            codes = codes.flatten(1)
        if scales.dtype == torch.float32:
            scales = scale_bytes(scales, self.kind)
        return fp4_weight(codes, scales, factor, kind=self.kind, name=name)

    def write(self, weight: FP4Weight, kept: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
        """The inverse of `read`, bit for bit: ``kept`` are the tensors beside codes and scales."""
        code, scale = self.leaf("codes"), self.leaf("scales")
        codes = weight.codes.view(weight.n, -1, weight.group // 2) if self.stacked else weight.codes
        scales, dtype = weight.scales, DTYPES[entries[scale].dtype]
        if self.transposed:
            codes, scales = weight.codes.T.contiguous(), scales.T.contiguous()
        scales = e8m0_values(scales).float() if dtype == torch.float32 else scales.view(dtype)
        made = {code: codes.view(DTYPES[entries[code].dtype]), scale: scales}
        return {part.leaf: t for part in self.parts if (t := {**kept, **made}.get(part.leaf)) is not None}

    def restore(
        self,
        held: FP4Weight,
        unfitted: tuple[Tensor, Tensor] | None,
        kept: Mapping[str, Tensor],
        entries: Mapping[str, Entry],
        path: str,
    ) -> dict[str, Tensor]:
        """The tensors from which a weight was packed, bit for bit, on the CPU.

        Args:
            held: what is packed.
            unfitted: rows whose scales packing changed (see `FP4Weight.fit`), and those scales as they were.
            kept: the tensors beside codes and scales.
            entries: what the checkpoint has.
            path: what an error calls it.

        Raises:
            CheckpointError: the weight was changed since it was loaded, so that its global scale does not belong to it.
        """
        scales = held.scales
        if unfitted is not None:
            rows, before = (tensor.to(scales.device) for tensor in unfitted)
            scales = scales.index_copy(0, rows, before)
        tensors = self.write(replace(held, scales=scales), kept, entries)
        again = self.read({leaf: t.to(scales.device) for leaf, t in tensors.items()}, path)
        again = again.fit_first(torch.float16, torch.bfloat16)
        fields = ((getattr(again, part), getattr(held, part)) for part in ("codes", "scales", "multiplier"))
        if not all(torch.equal(one, other) for one, other in fields):
            raise CheckpointError(
                f"{path}: found another weight than the checkpoint's, expected that one: a weight that was loaded into "
                "a packed module can be read by to_fp4(), but not saved in the checkpoint's format"
            )
        return {leaf: tensor.cpu() for leaf, tensor in tensors.items()}
