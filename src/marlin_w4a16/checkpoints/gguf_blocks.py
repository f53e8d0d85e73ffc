"""FP4 in files of GGUF: each row is blocks that hold the scales of some columns, then their codes.

The blocks are those of ggml (``block_mxfp4``, ``block_nvfp4`` in ggml-common.h)::

    MXFP4, 17 bytes for 32 columns: | E8M0 | 16 bytes of codes |
    NVFP4, 36 bytes for 64 columns: | 4 UE4M3 | 8 bytes of codes for each of them |

    the g columns of a scale: byte j holds the code of column j in its low nibble, that of j + g/2 in its high one

ggml doubles the values of codes and halves scales, which is the same. Of a UE4M3 byte the sign is not looked at, and
0x7F is zero.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.kernels.scale_bytes import ScaleKind

_ZERO = 0x7F
_UNKNOWN = 0xFF  # 480 to ggml, which E4M3 has not: it stays the NaN that is refused


@dataclass(frozen=True, slots=True)
class Block:
    """A type of blocks.

    Attributes:
        name: as ggml has it.
        kind: how scale bytes are read.
        group: columns that share a scale.
        scales: how many scales a block has.
    """

    name: str
    kind: ScaleKind
    group: int
    scales: int

    @property
    def columns(self) -> int:
        """Columns of a block."""
        return self.group * self.scales

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return self.scales + self.columns // 2

    def codes_of(self, rows: Tensor) -> Tensor:
        """Bytes ``[..., k / 2]``, the low nibble is the even column, of rows as they are stored."""
        stored = torch.unflatten(self._blocks(rows)[..., self.scales :], -1, (self.scales, self.group // 2))
        codes = torch.cat([stored & 0xF, stored >> 4], -1)
        return (codes[..., ::2] | codes[..., 1::2] << 4).flatten(-3)

    def scales_of(self, rows: Tensor) -> Tensor:
        """Scale bytes ``[..., k / group]`` of rows as they are stored."""
        scales = self._blocks(rows)[..., : self.scales].flatten(-2)
        if self.kind != "e4m3":
            return scales.contiguous()
        unsigned = torch.where(scales == _UNKNOWN, scales, scales & 0x7F)
        return torch.where(scales == _ZERO, 0, unsigned)

    def _blocks(self, rows: Tensor) -> Tensor:
        return torch.unflatten(rows, -1, (-1, self.nbytes))


BLOCKS = {39: Block("MXFP4", "e8m0", 32, 1), 40: Block("NVFP4", "e4m3", 16, 4)}  # by ggml's number of the type


@dataclass(frozen=True, slots=True)
class Placed(Entry):
    """A tensor that lies at a known place of its file.

    Attributes:
        start: its first byte.
        size: its bytes; ggml's quantised types have no whole number of them for an element.
    """

    start: int
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.size


@dataclass(frozen=True, slots=True)
class Blocks(Entry):
    """The codes or the scales of matrices that are stored in blocks.

    Attributes:
        starts: first bytes; of several matrices the rows alternate, a row of each.
        block: of which type.
        part: what it is of them.
        rows: of a matrix, of all that alternate.
        columns: of a matrix.
        experts: how many matrices there are along the first axis, or 0: there is no such axis.
        order: which row as it is stored each row is, or None: they are in order.
    """

    starts: tuple[int, ...]
    block: Block
    part: Literal["codes", "scales"]
    rows: int
    columns: int
    experts: int = 0
    order: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def matrix_nbytes(self) -> int:
        """Bytes of a matrix in the file."""
        return self.rows * self.columns // self.block.columns * self.block.nbytes

    def matrices(self, row: int | None) -> Iterator[Sequence[tuple[int, int]]]:
        """First bytes and their numbers of each matrix, or of one of them."""
        size = self.matrix_nbytes // len(self.starts)
        for expert in range(max(1, self.experts)) if row is None else (row,):
            yield [(start + expert * size, size) for start in self.starts]

    def read(self, stored: Tensor) -> Tensor:
        """The part ``[count, rows, ...]`` of matrices, given bytes ``[count, matrix_nbytes]``; not in `order` yet."""
        rows = torch.unflatten(stored, -1, (len(self.starts), self.rows // len(self.starts), -1))
        rows = rows.transpose(-2, -3).flatten(-3, -2)
        return self.block.codes_of(rows) if self.part == "codes" else self.block.scales_of(rows)
