"""Packs weights on a GPU: codes and scale bytes in rows become tiles (layout.py), all of a stack in one launch.

A lane makes the four words that it will read together. Each is one byte of two rows (r) at two places (h), so that no
byte crosses lanes: what the lanes of a warp ask for at once are four bytes of each of eight rows, and what it asks for
after that lies in the same sectors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PAD_SCALE, PackedFP4

_TILES = 2  # side by side, of a program


@triton.jit
def _bits_of_word(byte, REGISTER: tl.constexpr):
    """The byte of a register (two codes) as its bits stand in a word: the low code in the low half (layout.py)."""
    code = (byte | (byte << 12)) & 0x000F000F
    if REGISTER == 3:
        bits = ((code & 0x00080008) << 11) | ((code & 0x00060006) << 9) | ((code & 0x00010001) << 13)
    else:
        bits = ((code & 0x00080008) << (12 - 3 * REGISTER)) | ((code & 0x00070007) << (6 - 3 * REGISTER))
    return bits


@triton.jit
def _source_rows(rows, row, n, MAPPED: tl.constexpr):
    """The row of the source that stands at each packed row, or -1."""
    found = tl.load(rows + row, mask=row < n, other=-1) if MAPPED else tl.where(row < n, row, -1)
    return found.to(tl.int64)


# nothing is gained by knowing sizes; unknown, they share one compiled kernel
@triton.jit(
    do_not_specialize=["n", "k", "row_tiles", "k_tiles", "code_matrix", "code_row", "scale_matrix", "scale_row"]
)
def _pack_kernel(
    codes, scales, rows, words, tiles,
    n, k, row_tiles, k_tiles, code_matrix, code_row, code_column, scale_matrix, scale_row, scale_column,
    PAD: tl.constexpr, SIGNED: tl.constexpr, GROUP: tl.constexpr, MAPPED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = 64 // GROUP
    blocks = tl.cdiv(k_tiles, TILES)
    block = tl.program_id(0) % blocks
    row_tile = tl.program_id(0) // blocks % row_tiles
    matrix = (tl.program_id(0) // blocks // row_tiles).to(tl.int64)
    codes += matrix * code_matrix
    scales += matrix * scale_matrix
    first_tile = (matrix * row_tiles + row_tile) * k_tiles + block * TILES
    tile = tl.arange(0, TILES)[:, None, None]
    inside = block * TILES + tile < k_tiles

    at = tl.arange(0, 32)  # 8 w + g
    lane = tl.arange(0, 16)[None, None, :]  # 4 t + s
    step = block * TILES * 4 + tile * 4 + lane % 4  # of 16 columns
    word = tl.zeros((TILES, 32, 16), tl.int32)
    for r in tl.static_range(2):
        source = _source_rows(rows, row_tile * 64 + at // 8 * 16 + r * 8 + at % 8, n, MAPPED)[None, :, None]
        held = (source >= 0) & (step * 16 < k)
        flips = 0
        if SIGNED:
            column = (step * 16 // GROUP).to(tl.int64)
            scale = tl.load(scales + source * scale_row + column * scale_column, mask=held, other=0)
            flips = (scale.to(tl.int32) >> 7) * 0x88
        for h in tl.static_range(2):
            column = step * 8 + h * 4 + lane // 4
            byte = tl.load(codes + source * code_row + column.to(tl.int64) * code_column, mask=held, other=0).to(
                tl.int32
            )
            word |= _bits_of_word(byte ^ flips, 2 * h + r)
    tl.store(words + (first_tile + tile) * 512 + at[None, :, None] * 16 + lane, word, mask=inside)

    at = tl.arange(0, 64)  # 16 w + 2 g + r
    group = tl.arange(0, GROUPS)[None, None, :]
    source = _source_rows(rows, row_tile * 64 + at // 16 * 16 + at % 2 * 8 + at % 16 // 2, n, MAPPED)[None, :, None]
    column = (block * TILES + tile) * GROUPS + group
    held = (source >= 0) & (column * GROUP < k)
    scale = tl.load(scales + source * scale_row + column.to(tl.int64) * scale_column, mask=held, other=PAD)
    place = at[None, :, None] // 2 * (2 * GROUPS) + group // 2 * 4 + at[None, :, None] % 2 * 2 + group % 2
    tl.store(tiles + (first_tile + tile) * (64 * GROUPS) + place, scale, mask=inside)


def write_tiles(weight: FP4Weight, packed: PackedFP4, rows: Tensor | None) -> None:
    """Writes the words and the scales of `pack_into`, bit for bit those of plain torch; not the multiplier.

    Their versions count the write, as for one by torch.

    Args:
        weight, rows: see `pack_into`; of any strides.
        packed: contiguous.
    """
    if not packed.words.numel():
        return
    codes, scales = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (weight.codes, weight.scales))
    row_tiles, k_tiles = packed.words.shape[-3:-1]
    grid = (len(codes) * row_tiles * triton.cdiv(k_tiles, _TILES),)
    _pack_kernel[grid](
        codes, scales, codes if rows is None else rows, packed.words, packed.scales,
        packed.n, packed.k, row_tiles, k_tiles, *codes.stride(), *scales.stride(),
        PAD=PAD_SCALE[packed.kind], SIGNED=packed.kind == "e4m3", GROUP=packed.group, MAPPED=rows is not None,
        TILES=_TILES, num_warps=4,
    )  # fmt: skip
    for tensor in (packed.words, packed.scales):
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
