"""The packed layout: codes and scales in the order in which a tensor-core fragment reads them.

A tile is 64 rows by 64 columns, 512 words of 32 bits. Word ``[w, g, t, s]`` (4 x 8 x 4 x 4) is the whole A fragment
of one ``m16n8k16`` (or one warp of ``wgmma m64k16``) for lane ``4 g + t`` of warp ``w`` at k-step ``s``; a lane's four
words lie together, so one 16-byte load feeds four k-steps and no element ever crosses lanes. Its eight codes are
rows ``16 w + 8 r + g`` (r = 0, 1) and columns ``16 s + 8 h + 2 t + p`` (h, p = 0, 1). Codes p = 0, 1 of register
``2 h + r`` sit in the low and high half of the word, their bits interleaved so that one shift and one mask give a pair
of bfloat16 ``value * 2**-126`` (sign at bit 15, magnitude at 8..6):

    bit of the half   15  14  13  12  11  10   9   8 7 6   5 4 3   2 1 0
    register (h, r)   s0  s3  d3  s1  u3  m3  s2   magn0   magn1   magn2     s sign, u m d the magnitude bits of 3

    register 0  w & M          register 1  (w << 3) & M          register 2  (w << 6) & M          M = 0x81C081C0
    register 3  (w << 1) & 0x80008000 | (w >> 3) & 0x01800180 | (w >> 7) & 0x00400040

The bits of a half, and so these shifts and masks, are those of `HopperMXValueLayout` (triton_kernels in
triton-lang/triton, hopper_value.py), which also has four k-steps of a lane side by side. Weights in the order of
fragments, interleaved for shifts and masks, go back to Marlin (Frantar et al., 2024), whose conversion follows
FasterTransformer's interleaved_numeric_conversion.h. The order of a tile and of its scales is this project's.

Scale bytes follow the words: ``[w, g, c / 2, r, c % 2]`` with ``c`` the group within the tile, so that a 32-bit word
holds both rows of a lane for two groups: one shift and one mask give the pair (r = 0, 1) of either group. E4M3 scales
keep their sign bit there, but the sign itself is folded into the codes of the group. The multiplier stays ``[n]``.
Rows and columns are padded with zero codes to whole tiles here, never at run time; pad scales are one.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight, block_rows, format_name
from marlin_w4a16.kernels.scale_bytes import E8M0_BIAS, ScaleKind
from marlin_w4a16.kernels.target import supports

TILE = 64
TILE_WORDS = TILE * TILE // 8
LAYOUT = "tile64"
LAYOUTS = (LAYOUT,)

PAIR_MASK = 0x81C081C0
PAD_SCALE = {"e4m3": 0x38, "e8m0": E8M0_BIAS}
# Where bits 3..0 (sign, magnitude) of the code of register 2 h + r go in its half word.
_BIT_OF = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 11, 10, 13))


@dataclass(frozen=True, slots=True, eq=False)
class PackedFP4:
    """An FP4 weight as the kernels read it.

    Attributes:
        words: int32 ``[..., n / 64, k / 64, 512]``, tiles of codes.
        scales: uint8 ``[..., n / 64, k / 64, 4096 / group]``, tiles of scale bytes.
        multiplier: float32 ``[..., n]``.
        n, k: rows and columns without padding.
        kind, group: as in `FP4Weight`.
        layout: the id that op schemas carry.
        proofs: what the ops keep of their checks.
    """

    words: Tensor
    scales: Tensor
    multiplier: Tensor
    n: int
    k: int
    kind: ScaleKind
    group: int
    layout: str = LAYOUT
    proofs: list[Any] = field(default_factory=list, init=False, repr=False)

    @property
    def format(self) -> str:
        """The name of the format for people."""
        return format_name(self.kind, self.group)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scales and multiplier."""
        return self.words, self.scales, self.multiplier

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and multiplier."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def matrix(self, index: int | slice) -> "PackedFP4":
        """One matrix of a weight of three dimensions, or some of them, as views."""
        words, scales, multiplier = (t[index] for t in self.tensors)
        return replace(self, words=words, scales=scales, multiplier=multiplier)

    def to(self, device: torch.device) -> "PackedFP4":
        """The same weight on a device."""
        words, scales, multiplier = (t.to(device) for t in self.tensors)
        return replace(self, words=words, scales=scales, multiplier=multiplier)

    def contiguous(self) -> "PackedFP4":
        """The same weight, its tensors laid out as the kernels read them; itself where they are."""
        if all(t.is_contiguous() for t in self.tensors):
            return self
        words, scales, multiplier = (t.contiguous() for t in self.tensors)
        return replace(self, words=words, scales=scales, multiplier=multiplier)

    def per_row(self, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Multiplier and bias as a kernel is given them; where there is no bias, what it does not read."""
        return self.multiplier, self.multiplier if bias is None else bias.contiguous()

    def without_powers(self) -> tuple[Tensor, "PackedFP4"]:
        """The power of two of each multiplier (0 of 0), and the weight with what is left: from 1 to 2, of either sign.

        For float32 sums, which then leave its range where those of the dense weight do. A weight that takes its power
        stays exact but where its own values are below float32's smallest.
        """
        rest = 2 * torch.frexp(self.multiplier).mantissa
        powers = (self.multiplier / rest).where(rest != 0, 0.0)
        return powers, replace(self, multiplier=rest)

    def unpack(self, name: str = "weight") -> FP4Weight:
        """The inverse of `pack`, bit for bit."""
        lead = self.words.shape[:-3]
        codes = torch.empty((*lead, self.n, self.k // 2), dtype=torch.uint8, device=self.words.device)
        scales = torch.empty((*lead, self.n, self.k // self.group), dtype=torch.uint8, device=self.words.device)
        for rows, words, scale_tiles, codes_out, scales_out in self._blocks(codes, scales):
            count = rows.stop - rows.start
            signed, found = untile_scales(scale_tiles, self.group), _unpack_codes(words)
            _fold_signs(found, signed, self.kind, self.group)
            scales_out[rows] = signed[:count, : scales.shape[-1]]
            codes_out[rows] = found[:count, : codes.shape[-1]]
        return FP4Weight(codes, scales, self.multiplier.clone(), self.kind, self.group, name)

    def _blocks(self, *canonical: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Walks blocks of rows, as (rows, words, scale tiles), beside the matrices of two canonical tensors."""
        if not self.words.numel():
            return
        step = block_tiles(self.k)
        matrices = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]) for t in canonical)
        tiled = (t.view(math.prod(t.shape[:-3]), *t.shape[-3:]) for t in (self.words, self.scales))
        for words, scales, first, second in zip(*tiled, *matrices, strict=True):
            for start in range(0, words.shape[0], step):
                tiles = slice(start, min(start + step, words.shape[0]))
                rows = slice(start * TILE, min(tiles.stop * TILE, self.n))
                yield rows, words[tiles], scales[tiles], first, second


def packed_shapes(n: int, k: int, group: int) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int]]:
    """Shapes of words, scales and multiplier for a weight of ``n`` rows and ``k`` columns."""
    tiles = (-(-n // TILE), -(-k // TILE))
    return (*tiles, TILE_WORDS), (*tiles, TILE * TILE // group), (n,)


def packed_nbytes(n: int, k: int, group: int) -> int:
    """Bytes of a packed weight."""
    words, scales, multiplier = map(math.prod, packed_shapes(n, k, group))
    return 4 * words + scales + 4 * multiplier


def pack(weight: FP4Weight | PackedFP4) -> PackedFP4:
    """Packs a weight on its own device, beyond the packed tensors in a few tens of megabytes; or it is packed."""
    if isinstance(weight, PackedFP4):
        return weight
    packed = empty_packed(weight, weight.n)
    pack_into(weight, packed)
    return packed


def empty_packed(weight: FP4Weight, n: int, lead: Sequence[int] | None = None) -> PackedFP4:
    """Packed tensors, not filled yet, for matrices like those of a weight but of ``n`` rows, or for a stack of them."""
    lead, device = weight.codes.shape[:-2] if lead is None else lead, weight.codes.device
    words, scales, multiplier = packed_shapes(n, weight.k, weight.group)
    return PackedFP4(
        torch.empty((*lead, *words), dtype=torch.int32, device=device),
        torch.empty((*lead, *scales), dtype=torch.uint8, device=device),
        torch.empty((*lead, *multiplier), dtype=torch.float32, device=device),
        n,
        weight.k,
        weight.kind,
        weight.group,
    )


def pack_into(weight: FP4Weight, packed: PackedFP4, rows: Tensor | None = None) -> None:
    """Packs a weight over the tensors of a packed one of the same shape and format: addresses stay.

    Args:
        weight: a matrix or a stack of them.
        packed: what is written over.
        rows: which row of each matrix stands at each packed row, -1 where one of zeros does; None: all, as they are.
    """
    multiplier, device = weight.multiplier, weight.codes.device
    if rows is not None:
        rows = rows.to(device)
        multiplier = torch.where(rows < 0, 0, multiplier[..., rows.clamp(min=0)])
    same = (weight.k, weight.kind, weight.group) == (packed.k, packed.kind, packed.group)
    if not same or multiplier.shape != packed.multiplier.shape:
        raise ValueError(f"{weight.name}: found another shape or format than that of the packed weight")
    if supports(device) and packed.words.device == device and packed.contiguous() is packed:
        from marlin_w4a16.kernels.packing import write_tiles  # Triton, which there is for Linux only

        with torch.cuda.device(device):
            write_tiles(weight, packed, rows)
    else:
        _write_tiles(weight, packed, rows)
    # last: a kernel launched after this one may read words and scales before this one ends (programmatic launch)
    packed.multiplier.copy_(multiplier)


def _write_tiles(weight: FP4Weight, packed: PackedFP4, rows: Tensor | None) -> None:
    """Words and scales in plain torch, a block of rows at a time: what the kernel of packing.py writes, bit for bit."""
    kind, group = weight.kind, weight.group
    for at, words, scale_tiles, codes, scales in packed._blocks(weight.codes, weight.scales):
        some = at if rows is None else rows[at]
        codes, scales = _whole(codes, some, TILE // 2, 0), _whole(scales, some, TILE // group, PAD_SCALE[kind])
        _fold_signs(codes, scales, kind, group)
        _pack_codes(codes, words)
        scale_tiles.copy_(_tile_scales(scales, group))


def block_tiles(k: int) -> int:
    """Rows of tiles that make a block of bounded size in a weight of ``k`` columns."""
    return block_rows(k * TILE)


def tile_pairs(words: Tensor) -> list[Tensor]:
    """The four registers of each word: int32 tensors that hold pairs of ``E2M1 * 2**-126`` in bfloat16."""
    high = ((words << 1) & -0x7FFF8000) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    mask = PAIR_MASK - (1 << 32)
    return [words & mask, (words << 3) & mask, (words << 6) & mask, high]


def untile_rows(registers: Tensor) -> Tensor:
    """Puts ``[R, C, 4 w, 8 g, 4 t, 4 s, (2 h, 2 r), 2 p]`` values into rows and columns ``[64 R, 64 C]``."""
    r, c = registers.shape[:2]
    grid = registers.reshape(r, c, 4, 8, 4, 4, 2, 2, 2)  # R C w g t s h r p
    return grid.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(r * TILE, c * TILE)


def _whole(matrix: Tensor, rows: Tensor | slice, columns: int, value: int) -> Tensor:
    """Some rows of a matrix, filled up to whole tiles of ``columns``; the value where there is nothing."""
    found = matrix[rows] if isinstance(rows, slice) else matrix[rows.clamp(min=0)]
    if isinstance(rows, Tensor):
        found.masked_fill_((rows < 0)[:, None], value)
    shape = [-(-size // whole) * whole for size, whole in zip(found.shape, (TILE, columns), strict=True)]
    whole = found.new_full(shape, value)
    whole[: found.shape[0], : found.shape[1]] = found
    return whole


def _pack_codes(codes: Tensor, words: Tensor) -> None:
    """Writes the words ``[R, C, 512]`` of codes in whole tiles."""
    r, c = words.shape[:2]
    # R w r g | C s h, and t by bytes: those that lie side by side in a row
    quads = codes.view(torch.int32).reshape(r, 4, 2, 8, c, 4, 2).permute(6, 2, 0, 4, 1, 3, 5)
    byte = quads.contiguous().view(torch.uint8).flatten(2).int()  # h r, and R C w g s t
    tables = (table.to(codes.device) for table in _tables()[:2])
    first, second = (t.index_select(0, low | (high << 8)) for t, (low, high) in zip(tables, byte, strict=True))
    words.view(r, c, 4, 8, 4, 4).copy_((first | second).view(r, c, 4, 8, 4, 4).transpose(-1, -2))


def _unpack_codes(words: Tensor) -> Tensor:
    (r, c, _), table = words.shape, _tables()[2].to(words.device)
    low, high = (table.index_select(0, (half & 0xFFFF).flatten()) for half in (words, words >> 16))
    grid = (low | (high << 4)).view(torch.uint8).view(r, c, 4, 8, 4, 4, 2, 2)  # R C w g t s h r
    return grid.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(r * TILE, c * TILE // 2)


@functools.cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Words by the two bytes of rows r = 0 and 1, for h = 0 and 1; and low nibbles by half words. Each ``[65536]``."""
    index = torch.arange(1 << 16, dtype=torch.int32, device="cpu")
    first, second, back = (torch.zeros_like(index) for _ in range(3))
    for register, places in enumerate(_BIT_OF):
        word, byte = (first, second)[register // 2], 8 * (register % 2)
        for bit, place in zip((3, 2, 1, 0), places, strict=True):
            word |= (((index >> (byte + bit)) & 1) << place) | (((index >> (byte + bit + 4)) & 1) << (place + 16))
            back |= ((index >> place) & 1) << (8 * register + bit)
    return first, second, back


def _fold_signs(codes: Tensor, scales: Tensor, kind: ScaleKind, group: int) -> None:
    """Flips, in place, the signs of the codes whose block scale is negative; its own inverse. Both in whole tiles."""
    if kind == "e4m3":
        flips = (scales >> 7).long() * -0x7777777777777778  # the signs of 16 codes
        codes.view(torch.int64).unflatten(-1, (-1, group // 16)).bitwise_xor_(flips.unsqueeze(-1))


def _tile_scales(scales: Tensor, group: int) -> Tensor:
    n, groups = scales.shape
    per_tile = TILE // group
    grid = scales.reshape(n // TILE, 4, 2, 8, groups // per_tile, per_tile // 2, 2).permute(0, 4, 1, 3, 5, 2, 6)
    return grid.reshape(n // TILE, groups // per_tile, TILE * per_tile)


def untile_scales(scales: Tensor, group: int) -> Tensor:
    """Scale tiles ``[R, C, 4096 / group]`` as rows ``[64 R, 64 C / group]``."""
    r, c, _ = scales.shape
    per_tile = TILE // group
    return scales.reshape(r, c, 4, 8, per_tile // 2, 2, 2).permute(0, 2, 5, 3, 1, 4, 6).reshape(r * TILE, c * per_tile)
