"""Tables of tiles: up to ``block_m`` adjacent places whose tokens share an expert.

How many tiles there are is known on the GPU only; the tables have room for the most there can be.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from marlin_w4a16.kernels.record import scratch, submit


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Tiles of pairs.

    Attributes:
        experts: int32 ``[most]``, the expert of each tile; -1 beyond the last.
        starts, stops: int32 ``[most]``, the first place of each tile in the order, and the end of its expert's places.
        count: int32 ``[1]``, how many there are.
        order: int32 ``[pairs]``, the pair at each place, -1 beyond the last; None where pairs stand in order already.
        places: int32 ``[pairs]``, the inverse: the place of each pair, -1 where it has none; None where not needed.
        block_m: places of a tile.
    """

    experts: Tensor
    starts: Tensor
    stops: Tensor
    count: Tensor
    order: Tensor | None
    places: Tensor | None
    block_m: int

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Experts, starts, stops and count, in the order in which kernels take them."""
        return self.experts, self.starts, self.stops, self.count


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles that so many pairs can take: every expert that is chosen may have one that is not full."""
    chosen = min(pairs, experts)
    return (pairs + chosen * (block_m - 1)) // block_m


def empty_tiles(like: Tensor, most: int, order: Tensor | None, places: Tensor | None, block_m: int) -> Tiles:
    """Tables for so many tiles, on the device of a tensor."""
    experts, starts, stops = (scratch(most, torch.int32, like.device) for _ in range(3))
    count = scratch(1, torch.int32, like.device)
    return Tiles(experts, starts, stops, count, order, places, block_m)


def bins_for(experts: int) -> int:
    """A power of two for the experts."""
    return max(16, 1 << (experts - 1).bit_length())


@triton.jit
def write_tiles(mine, first, last, start, stop, tile_experts, tile_starts, tile_stops, BLOCK_M: tl.constexpr):
    """The tiles from ``first`` up to ``last``: those of an expert's places."""
    for tile in range(first, last, 128):
        at = tile + tl.arange(0, 128)
        tl.store(tile_experts + at, mine, mask=at < last)
        tl.store(tile_starts + at, start + (at - first) * BLOCK_M, mask=at < last)
        tl.store(tile_stops + at, stop, mask=at < last)


@triton.jit
def end_tiles(last, most, tile_experts, count):
    """How many tiles there are, and that there are none beyond."""
    tl.store(count, last)
    for tile in range(last, most, 128):
        at = tile + tl.arange(0, 128)
        tl.store(tile_experts + at, -1, mask=at < most)


@triton.jit(do_not_specialize=["rows", "experts", "most"])
def _offset_kernel(
    offsets, tile_experts, tile_starts, tile_stops, count,
    rows, experts, most,
    BINS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program an expert, and one for the rows after the last of them, whose expert is called ``experts``."""
    mine = tl.program_id(0)
    bins = tl.arange(0, BINS)
    # an end never lies before the one before it, nor past the rows
    ends = tl.load(offsets + bins, mask=bins < experts, other=0).to(tl.int32)
    ends = tl.minimum(tl.where(bins < experts, ends, rows), rows)
    starts = tl.load(offsets + bins - 1, mask=(bins > 0) & (bins <= experts), other=0).to(tl.int32)
    starts = tl.minimum(starts, rows)
    tiles = tl.where(bins <= experts, tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M), 0)
    first = tl.sum(tl.where(bins < mine, tiles, 0))
    last = first + tl.sum(tl.where(bins == mine, tiles, 0))
    start = tl.sum(tl.where(bins == mine, starts, 0))
    stop = tl.sum(tl.where(bins == mine, ends, 0))
    write_tiles(mine, first, last, start, stop, tile_experts, tile_starts, tile_stops, BLOCK_M)
    if mine == experts:
        end_tiles(last, most, tile_experts, count)


def tiles_of_offsets(offsets: Tensor, rows: int, block_m: int) -> Tiles:
    """The tiles of rows that are sorted by expert; those past the last offset belong to one more, the last."""
    experts = len(offsets)
    tiles = empty_tiles(offsets, most_tiles(rows, experts + 1, block_m), None, None, block_m)
    submit(
        _offset_kernel, (experts + 1,),
        offsets.contiguous(), *tiles.tables,
        rows, experts, len(tiles.experts),
        BINS=bins_for(experts + 1), BLOCK_M=block_m,
    )  # fmt: skip
    return tiles
