"""FP8 weights beside those in FP4: decoded when they are loaded, and FP8 again, bit for bit, when they are saved."""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.storage import FP4Storage, Part, Role
from marlin_w4a16.kernels.fp4 import round_once, row_slices
from marlin_w4a16.kernels.scale_bytes import e8m0_values, fp8_codes, scale_table


@dataclass(frozen=True, slots=True)
class FP8Storage:
    """A linear whose weight is FP8 (E4M3) with scales.

    Attributes:
        label: the producer's name for the format.
        parts: its tensors: codes, scales, maybe an input scale.
        block: rows and columns that share a scale; None: one is for all, or for each row.
    """

    label: str
    parts: tuple[Part, ...]
    block: tuple[int, int] | None = None
    joint: ClassVar[str] = "."
    stacked: ClassVar[bool] = False
    big: ClassVar[tuple[Role, ...]] = ("codes",)

    def named(self, leaves: Container[str]) -> "FP8Storage":
        """See `FP4Storage.named`."""
        found = [next((a for a in (part.leaf, *part.aliases) if a in leaves), part.leaf) for part in self.parts]
        parts = tuple(replace(part, leaf=leaf) for part, leaf in zip(self.parts, found, strict=True))
        return self if parts == self.parts else replace(self, parts=parts)

    def leaf(self, role: Role) -> str:
        """The name of a tensor that every linear has."""
        return next(part.leaf for part in self.parts if part.role == role)

    @property
    def scales(self) -> str:
        """The shape of scales in words."""
        if self.block is None:
            return "a scale for the weight or for each row"
        return "[" + ", ".join(f"{axis} / {size}" for axis, size in zip("nk", self.block, strict=True)) + "]"

    def shape_of(self, entries: Mapping[str, Entry]) -> tuple[int, int, int] | None:
        """Rows and columns, and 0 for the group size, or None: it is no matrix, or its scales are for another one."""
        shape, scales = entries[self.leaf("codes")].shape, entries[self.leaf("scales")].shape
        if len(shape) != 2:
            return None
        if self.block is not None:
            rows, columns = (-(-n // b) for n, b in zip(shape, self.block, strict=True))
            if scales not in ((rows, columns), (rows, 1, columns, 1)):  # the latter: FP8_PB_WO of ModelOpt 0.47
                return None
        return (shape[0], shape[1], 0)

    def fits(self, part: Part, shape: tuple[int, ...], axes: Mapping[str, int]) -> bool:
        """Whether a tensor has its shape; a scale may be one for the weight, and one per row may keep its axis."""
        if part.role == "scales" and self.block is not None:
            return True  # see shape_of
        expected = tuple(axes[axis] for axis in part.shape)
        one = math.prod(shape) == 1 and part.role != "codes"
        return one or shape == expected or (part.role == "scales" and shape == (*expected, 1))

    def format(self, group: int) -> str:
        """The name of the format for people."""
        if self.block is None:
            return "FP8 E4M3"
        return "MXFP8" if self.block[0] == 1 else f"FP8 E4M3 in blocks of {self.block[0]} x {self.block[1]}"

    def read(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The weight ``[n, k]``, rounded once to ``dtype``."""
        codes = tensors[self.leaf("codes")]
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in row_slices(*codes.shape):
            out[rows] = round_once(codes[rows].double() * self._factor(tensors, rows, codes.shape[1]), dtype)
        return out

    def write(self, weight: Tensor, kept: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """The inverse of `read`.

        Raises:
            ValueError: the weight is not what was loaded: it changed, or its dtype cannot hold the codes.
        """
        kept = {leaf: tensor.to(weight.device) for leaf, tensor in kept.items()}
        self._expect_wide(weight.dtype, kept, name)
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        for rows in row_slices(*weight.shape):
            factor = self._factor(kept, rows, weight.shape[1])
            found = fp8_codes(weight[rows], factor.masked_fill(factor == 0, 1), round_once)  # all products with 0 are 0
            lost = (factor == 0) & (weight[rows].abs() > 0)
            if found is None or bool(lost.any()):
                raise ValueError(
                    f"{name}.weight: found values that are no FP8 codes times their scales, expected those loaded: "
                    "save with dequantize() to store what the layer holds now"
                )
            codes[rows] = found
        return {self.leaf("codes"): codes, **kept}

    def _expect_wide(self, dtype: torch.dtype, kept: Mapping[str, Tensor], name: str) -> None:
        scales = self._values(kept[self.leaf("scales")]).reshape(-1, 1)
        every = scale_table("e4m3", scales.device, torch.float64)[:0x7F]  # the finite ones that are not negative
        for part in torch.split(scales, 1 << 14):
            held = round_once(every * part, dtype)
            if not bool(held.isfinite().all() and ((held.diff() > 0) | (part == 0)).all()):
                raise ValueError(
                    f"{name}.weight: found {dtype}, expected a dtype that holds every FP8 code times its scale: load "
                    "in bfloat16 or float32 to save"
                )

    def _factor(self, tensors: Mapping[str, Tensor], rows: slice, columns: int) -> Tensor:
        """What the codes of some rows are multiplied by."""
        scale = self._values(tensors[self.leaf("scales")])
        if self.block is None:
            return scale.reshape(-1, 1)[rows] if scale.numel() > 1 else scale.reshape(())
        scale = scale.reshape(scale.shape[0], -1)
        first, wide = rows.start // self.block[0], self.block[1]
        blocks = scale[first : -(-rows.stop // self.block[0])].repeat_interleave(self.block[0], 0)
        start = rows.start - first * self.block[0]
        return blocks[start : start + rows.stop - rows.start].repeat_interleave(wide, 1)[:, :columns]

    def _values(self, scales: Tensor) -> Tensor:
        if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            return e8m0_values(scales.view(torch.uint8)).double()
        return scales.double()


Storage = FP4Storage | FP8Storage
