"""How one quantised weight is stored: its tensors, their dtypes and shapes, and which way they decode."""

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.layouts import ROWS, Layout
from marlin_w4a16.kernels.fp4 import E2M1_MAX, FP4Weight, format_name, fp4_weight
from marlin_w4a16.kernels.inputs import Rounding
from marlin_w4a16.kernels.scale_bytes import E4M3_MAX, ScaleKind, e8m0_values, scale_bytes

FLOATS = ("F32", "BF16", "F16")
AMAX = E4M3_MAX * E2M1_MAX  # the largest value of a weight whose multiplier is 1
STORED_SCALES: dict[ScaleKind, tuple[str, ...]] = {"e4m3": ("F8_E4M3",), "e8m0": ("U8", "F8_E8M0")}
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8,
    "U32": torch.uint32, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
Role = Literal[
    "codes", "scales", "multiplier", "divisor", "amax", "input multiplier", "input divisor", "pre-quant scale",
    "rotation", "low rank a", "low rank b", "unused",
]  # fmt: skip
# What the weight is not decoded with: it need not be there, nor hold numbers, unless inputs are quantised.
OF_INPUTS: tuple[Role, ...] = ("input multiplier", "input divisor", "unused")
LOW_RANK: tuple[Role, ...] = ("low rank a", "low rank b")


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a stored weight.

    Attributes:
        leaf: the last part of its name.
        role: what it is. Global scales multiply or divide, or are 448 * 6 times what multiplies (``"amax"``); those of
            the input belong to W4A4; a pre-quant scale multiplies the input before the product (AWQ), a rotation is the
            matrix by which each block of the input is, ``x a.T b.T`` is added to it (SVDQuant); what is unused is only
            kept.
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

    def told(self, axes: Mapping[str, int]) -> str:
        """Its shape for people, given the length of each axis."""
        if self.role == "rotation":
            return f"a square matrix whose side divides {axes['k']}"
        lengths = ", ".join(str(axes.get(axis, "any")) for axis in self.shape)
        return f"shape [{lengths}]" if self.shape else "one element"


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
        stacked: whether it is of every expert, along a first axis of its tensors.
        layout: how codes and scales lie.
        renamed: patterns in the path of a weight of all experts, and what stands there in that of the first expert.
    """

    label: str
    kind: ScaleKind
    groups: tuple[int, ...]
    parts: tuple[Part, ...]
    activations: Activations | None = None
    joint: str = "."
    stacked: bool = False
    layout: Layout = ROWS
    renamed: tuple[tuple[str, str], ...] = ()
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
        return replace(self, parts=tuple(parts), joint="_", stacked=True, layout=Layout(transposed=True))

    def part(self, *roles: Role) -> Part | None:
        """The tensor that plays one of some roles."""
        return next((part for part in self.parts if part.role in roles), None)

    def leaf(self, *roles: Role) -> str:
        """The name of a tensor that every linear has."""
        part = self.part(*roles)
        if part is None:
            raise KeyError(roles)
        return part.leaf

    def placed(self, path: str) -> str:
        """The path of a weight where a model has one for each expert."""
        for pattern, instead in self.renamed:
            path = re.sub(pattern, instead, path)
        return path

    @property
    def scales(self) -> str:
        """The shape of block scales in words."""
        told = self.layout.told(" or ".join(map(str, self.groups)))
        return f"[experts, {told[1:]}" if self.stacked else told

    def shape_of(self, entries: Mapping[str, Entry]) -> tuple[int, int, int] | None:
        """Rows, columns and group size by the shapes of codes and scales, or None: they make no linear."""
        codes, scales = (entries[self.leaf(role)].shape for role in ("codes", "scales"))
        experts, codes, scales = (codes[:1], scales[:1]), codes[self.stacked :], scales[self.stacked :]
        if self.layout.transposed:
            codes, scales = codes[::-1], scales[::-1]
        if self.layout.codes == "blocks":
            codes = (*codes[:1], math.prod(codes[1:]))
        if len(codes) != 2 or len(scales) != 2 or not scales[1]:
            return None
        n, k = codes[0], self.layout.columns(codes[1])
        if not self.layout.plain:
            alike = not self.stacked or experts[0] == experts[1]
            fitting = (g for g in self.groups if alike and not k % g and scales == self.layout.scales_shape(n, k // g))
            return next(((n, k, group) for group in fitting), None)
        return None if k % scales[1] or k // scales[1] not in self.groups else (n, k, k // scales[1])

    def fits(self, part: Part, shape: tuple[int, ...], axes: Mapping[str, int]) -> bool:
        """Whether a tensor has its shape; of codes and scales that do not lie in rows, `shape_of` has told that."""
        if part.role == "unused" or (part.role in self.big and not self.layout.plain):
            return True
        if part.role == "rotation":
            return len(shape) == 2 and shape[0] == shape[1] > 0 and not axes["k"] % shape[0]
        if not part.shape:
            return math.prod(shape) == 1 or (self.stacked and shape == (axes["e"],))
        wanted = tuple(axes.get(axis, found) for axis, found in zip(part.shape, shape, strict=False))
        return len(shape) == len(part.shape) and shape == wanted

    def format(self, group: int) -> str:
        """The name of the format for people."""
        return format_name(self.kind, group)

    def read(self, tensors: Mapping[str, Tensor], name: str) -> FP4Weight:
        """The weight that some tensors, by leaf, are."""
        part = self.part("multiplier", "divisor", "amax")
        factor: Tensor | float = 1.0
        if part is not None and part.leaf in tensors:
            factor = tensors[part.leaf].float()
            factor = factor.reciprocal() if part.role == "divisor" else factor / AMAX if part.role == "amax" else factor
        codes, scales = self.layout.read_codes(tensors[self.leaf("codes")]), tensors[self.leaf("scales")]
        if scales.dtype == torch.float32:
            scales = scale_bytes(scales, self.kind)
        if self.layout.transposed:
            scales = scales.mT.contiguous()
        if not self.layout.plain:
            n, k = codes.shape[0], codes.shape[1] * 2
            group = next(g for g in self.groups if self.layout.scales_shape(n, k // g) == tuple(scales.shape))
            scales = self.layout.read_scales(scales, n, k // group)
        return fp4_weight(codes, scales, factor, kind=self.kind, name=name)

    def write(self, weight: FP4Weight, kept: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
        """The inverse of `read`, bit for bit: ``kept`` are the tensors beside codes and scales."""
        code, scale = self.leaf("codes"), self.leaf("scales")
        codes = self.layout.write_codes(weight.codes, weight.group)
        scales, dtype = self.layout.write_scales(weight.scales), DTYPES[entries[scale].dtype]
        if self.layout.transposed:
            scales = scales.mT.contiguous()
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
