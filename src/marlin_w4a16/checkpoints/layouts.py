"""How codes and scales lie in the tensors of a checkpoint: inverse pairs of reading and writing them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from marlin_w4a16.kernels.scale_bytes import swizzle, unswizzle

Codes = Literal["low", "words", "blocks"]


@dataclass(frozen=True, slots=True)
class Layout:
    """The way in which one matrix is stored.

    Attributes:
        codes: ``"low"``: two in a byte, the low nibble is the even column; ``"words"``: the same in little-endian words
            of 32 bits; ``"blocks"``: the same, those that share a scale in an axis of their own.
        tiles: scales lie in tiles of 128 by 4, padded with zeros, see `swizzle`; else in rows.
        rows: how many rows of the weight share a row of scales.
        transposed: codes and scales are ``[k / 2, n]`` and ``[k / group, n]``; the latter `FP4Storage` turns.
    """

    codes: Codes = "low"
    tiles: bool = False
    rows: int = 1
    transposed: bool = False

    @property
    def plain(self) -> bool:
        """Whether the shapes of codes and scales are those of the weight."""
        return self.codes != "words" and not self.tiles and self.rows == 1

    def columns(self, last: int) -> int:
        """How many columns a row of codes has, given its length."""
        return last * (8 if self.codes == "words" else 2)

    def scales_shape(self, n: int, groups: int) -> tuple[int, int]:
        """The shape of the scales of ``n`` rows."""
        if self.tiles:
            return -(-n // 128) * 32, -(-groups // 4) * 16
        return -(-n // self.rows), groups

    def told(self, groups: str) -> str:
        """That shape in words."""
        if self.tiles:
            return f"[ceil(n / 128) * 32, ceil(k / {groups} / 4) * 16], tiles of 128 by 4"
        if self.transposed:
            return f"[k / {groups}, n]"
        return f"[n / {self.rows}, k / {groups}]" if self.rows > 1 else f"[n, k / {groups}]"

    def read_codes(self, stored: Tensor) -> Tensor:
        """Bytes ``[n, k / 2]``, low nibble first."""
        return _READ[self.codes](stored.mT.contiguous() if self.transposed else stored)

    def write_codes(self, codes: Tensor, group: int) -> Tensor:
        """The inverse of `read_codes`."""
        written = _WRITE[self.codes](codes, group)
        return written.mT.contiguous() if self.transposed else written

    def read_scales(self, stored: Tensor, n: int, groups: int) -> Tensor:
        """Scales ``[n, groups]`` in their dtype.

        Raises:
            ValueError: tiles are not padded with zeros, so that the scales would not be saved as they were.
        """
        if not self.tiles:
            return stored if self.rows == 1 else stored.repeat_interleave(self.rows, 0)[:n]
        scales = unswizzle(stored, n, groups)
        if not torch.equal(swizzle(scales, stored.shape).view(torch.uint8), stored.view(torch.uint8)):
            raise ValueError("found tiles of scales that are not padded with zeros, expected zeros")
        return scales

    def write_scales(self, scales: Tensor) -> Tensor:
        """The inverse of `read_scales`, given its bytes."""
        if self.tiles:
            return swizzle(scales, torch.Size(self.scales_shape(*scales.shape)))
        return scales if self.rows == 1 else scales[:: self.rows].contiguous()


ROWS = Layout()


def _same(codes: Tensor, *_: int) -> Tensor:
    return codes


_READ: dict[Codes, Callable[[Tensor], Tensor]] = {
    "low": _same,
    "words": lambda stored: stored.view(torch.uint8),
    "blocks": lambda stored: stored.flatten(-2),
}
_WRITE: dict[Codes, Callable[[Tensor, int], Tensor]] = {
    "low": _same,
    "words": lambda codes, group: codes.view(torch.uint32),
    "blocks": lambda codes, group: codes.view(*codes.shape[:-1], -1, group // 2),
}
