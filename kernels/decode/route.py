"""From the experts that tokens choose to tiles of tokens that share one: no synchronisation, no atomics.

A *pair* is one choice of one token: ``token * k + choice``. Pairs are put in the order of their experts, and a tile is
up to ``block_m`` of them that share one. How many tiles there are is known on the GPU only; the tables have room for
the most there can be.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FEW = 128  # pairs up to which each is compared with all others
_BLOCK = 4096  # pairs looked at at a time


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


def most_tiles(pairs: int, experts: int, block_m: int) -> int:
    """The most tiles that so many pairs can take: every expert that is chosen may have one that is not full."""
    chosen = min(pairs, experts)
    return (pairs + chosen * (block_m - 1)) // block_m


@triton.jit
def local_expert(ids, expert_map, at, in_range, known, experts, HAS_MAP: tl.constexpr):
    """The expert that pairs chose, -1 where it is none of these (``expert_map`` has ``known`` places)."""
    expert = tl.load(ids + at, mask=in_range, other=-1).to(tl.int64)
    if HAS_MAP:
        mapped = (expert >= 0) & (expert < known)
        expert = tl.where(mapped, tl.load(expert_map + expert, mask=in_range & mapped, other=0).to(tl.int64), -1)
    # what a mask leaves out cannot be -1 where ids are unsigned: it says so itself
    return tl.where(in_range & (expert >= 0) & (expert < experts), expert, -1).to(tl.int32)


@triton.jit
def _write_tiles(mine, first, last, start, stop, tile_experts, tile_starts, tile_stops, BLOCK_M: tl.constexpr):
    for tile in range(first, last, 128):
        at = tile + tl.arange(0, 128)
        tl.store(tile_experts + at, mine, mask=at < last)
        tl.store(tile_starts + at, start + (at - first) * BLOCK_M, mask=at < last)
        tl.store(tile_stops + at, stop, mask=at < last)


@triton.jit
def _end_tiles(last, most, tile_experts, count):
    tl.store(count, last)
    for tile in range(last, most, 128):
        at = tile + tl.arange(0, 128)
        tl.store(tile_experts + at, -1, mask=at < most)


@triton.jit(do_not_specialize=["pairs", "known", "experts"])
def _count_kernel(
    ids,
    expert_map,
    counts,
    pairs,
    known,
    experts,
    HAS_MAP: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program an expert: how many pairs chose it."""
    mine = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    hits = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, pairs, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        hits += (local_expert(ids, expert_map, at, at < pairs, known, experts, HAS_MAP) == mine).to(tl.int32)
    tl.store(counts + mine, tl.sum(hits))


@triton.jit(do_not_specialize=["pairs", "known", "experts", "most"])
def _expert_kernel(
    ids,
    expert_map,
    counts,
    tile_experts,
    tile_starts,
    tile_stops,
    count,
    order,
    places,
    pairs,
    known,
    experts,
    most,
    HAS_MAP: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program an expert: the places of its pairs, in their order, and its tiles."""
    mine = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    bins = tl.arange(0, BINS)
    taken = tl.load(counts + bins, mask=bins < experts, other=0)
    first = tl.sum(tl.where(bins < mine, tl.cdiv(taken, BLOCK_M), 0))
    start = tl.sum(tl.where(bins < mine, taken, 0))
    own = tl.sum(tl.where(bins == mine, taken, 0))
    last = first + tl.cdiv(own, BLOCK_M)
    if own > 0:
        _write_tiles(mine, first, last, start, start + own, tile_experts, tile_starts, tile_stops, BLOCK_M)
        place = start
        for begin in range(0, pairs, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            hit = (local_expert(ids, expert_map, at, at < pairs, known, experts, HAS_MAP) == mine).to(tl.int32)
            to = place + tl.cumsum(hit, 0) - 1
            tl.store(order + to, at, mask=hit > 0)
            tl.store(places + at, to, mask=hit > 0)
            place += tl.sum(hit)
    if mine == experts - 1:
        _end_tiles(last, most, tile_experts, count)
        if start + own < pairs:  # some chose none of these experts
            for begin in range(0, pairs, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                tl.store(order + at, -1, mask=(at >= start + own) & (at < pairs))
                local = local_expert(ids, expert_map, at, at < pairs, known, experts, HAS_MAP) >= 0
                tl.store(places + at, -1, mask=(at < pairs) & ~local)


@triton.jit(do_not_specialize=["rows", "experts", "most"])
def _offset_kernel(
    offsets,
    tile_experts,
    tile_starts,
    tile_stops,
    count,
    rows,
    experts,
    most,
    BINS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
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
    _write_tiles(mine, first, last, start, stop, tile_experts, tile_starts, tile_stops, BLOCK_M)
    if mine == experts:
        _end_tiles(last, most, tile_experts, count)


def tiles_of_experts(
    topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int, pdl: bool = False
) -> Tiles:
    """The tiles of tokens that choose ``topk_ids`` ``[tokens, k]``."""
    ids = topk_ids.contiguous()
    order = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    counts = torch.empty(experts, dtype=torch.int32, device=ids.device)
    tiles = _empty(ids, most_tiles(ids.numel(), experts, block_m), order, torch.empty_like(order), block_m)
    known = 0 if expert_map is None else len(expert_map)
    of = (ids, ids if expert_map is None else expert_map.contiguous())
    how = {"HAS_MAP": expert_map is not None, "BLOCK": _BLOCK, "num_warps": 16, **early_launch(pdl)}
    _count_kernel[(experts,)](*of, counts, ids.numel(), known, experts, **how)
    _expert_kernel[(experts,)](
        *of,
        counts,
        tiles.experts,
        tiles.starts,
        tiles.stops,
        tiles.count,
        order,
        tiles.places,
        ids.numel(),
        known,
        experts,
        len(tiles.experts),
        BINS=_bins(experts),
        BLOCK_M=block_m,
        **how,
    )
    return tiles


def tiles_of_offsets(offsets: Tensor, rows: int, block_m: int) -> Tiles:
    """The tiles of rows that are sorted by expert; those past the last offset belong to one more, the last."""
    experts = len(offsets)
    tiles = _empty(offsets, most_tiles(rows, experts + 1, block_m), None, None, block_m)
    _offset_kernel[(experts + 1,)](
        offsets.contiguous(),
        tiles.experts,
        tiles.starts,
        tiles.stops,
        tiles.count,
        rows,
        experts,
        len(tiles.experts),
        BINS=_bins(experts + 1),
        BLOCK_M=block_m,
    )
    return tiles


def _empty(like: Tensor, most: int, order: Tensor | None, places: Tensor | None, block_m: int) -> Tiles:
    experts, starts, stops = (torch.empty(most, dtype=torch.int32, device=like.device) for _ in range(3))
    count = torch.empty(1, dtype=torch.int32, device=like.device)
    return Tiles(experts, starts, stops, count, order, places, block_m)


def early_launch(pdl: bool) -> dict[str, bool]:
    """How a kernel is compiled and launched that may begin before the one before it has ended."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _bins(experts: int) -> int:
    """A power of two for the experts."""
    return max(16, 1 << (experts - 1).bit_length())


@triton.jit
def _gather_kernel(x, places, out, k, stride_xm, CHOICES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.load(x + token.to(tl.int64) * stride_xm + column, mask=column < k, other=0.0)
    for choice in tl.static_range(CHOICES):
        place = tl.load(places + token * CHOICES + choice)
        tl.store(out + place.to(tl.int64) * k + column, row, mask=(place >= 0) & (column < k))


@triton.jit(do_not_specialize=["pairs", "known", "experts", "most"])
def _few_kernel(
    ids,
    expert_map,
    tile_experts,
    tile_starts,
    tile_stops,
    count,
    order,
    x,
    out,
    pairs,
    known,
    experts,
    most,
    k,
    stride_xm,
    HAS_MAP: tl.constexpr,
    CHOICES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a pair, which finds its place among all of them and brings its row of x there."""
    mine = tl.program_id(0)
    at = tl.arange(0, PAIRS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # pairs that chose no expert come last
    expert = local_expert(ids, expert_map, at, at < pairs, known, experts, HAS_MAP)
    chosen = expert >= 0
    key = tl.where(chosen, expert, experts)
    same = (key[:, None] == key[None, :]) & (at < pairs)[None, :]
    rank = tl.sum((same & (at[None, :] < at[:, None])).to(tl.int32), 1)
    begins = chosen & (rank % BLOCK_M == 0)
    own = tl.sum(tl.where(at == mine, key, 0))
    before = (at < pairs) & ((key < own) | ((key == own) & (at < mine)))
    place = tl.sum(before.to(tl.int32))
    tile = tl.sum((before & begins).to(tl.int32))
    tl.store(order + place, tl.where(own < experts, mine, -1))
    if tl.sum((begins & (at == mine)).to(tl.int32)) > 0:
        tl.store(tile_experts + tile, own)
        tl.store(tile_starts + tile, place)
        tl.store(tile_stops + tile, tl.sum((chosen & (key <= own)).to(tl.int32)))
    if mine == 0:
        last = tl.sum(begins.to(tl.int32))
        tl.store(count, last)
        tl.store(tile_experts + at, -1, mask=(at >= last) & (at < most))
    for first in range(0, k, BLOCK):
        column = first + tl.arange(0, BLOCK)
        wanted = (column < k) & (own < experts)
        row = tl.load(x + (mine // CHOICES).to(tl.int64) * stride_xm + column, mask=wanted, other=0.0)
        tl.store(out + place.to(tl.int64) * k + column, row, mask=wanted)


def sorted_tokens(
    x: Tensor, topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int, pdl: bool = True
) -> tuple[Tiles, Tensor]:
    """The tiles of tokens that choose ``topk_ids``, and the rows of x ``[tokens, hidden]`` in their order.

    Rows of places that no pair has are left as they are. ``pdl``: the kernels may begin before the one before them
    has ended, which SM90 is the first to know.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    pairs, choices = topk_ids.numel(), topk_ids.shape[1]
    out = torch.empty((pairs, x.shape[1]), dtype=x.dtype, device=x.device)
    block = min(2048, triton.next_power_of_2(x.shape[1]))
    how = {"CHOICES": choices, "BLOCK": block, **early_launch(pdl)}
    if pairs > FEW:
        tiles = tiles_of_experts(topk_ids, expert_map, experts, block_m, pdl)
        _gather_kernel[(x.shape[0], triton.cdiv(x.shape[1], block))](
            x, tiles.places, out, x.shape[1], x.stride(0), **how
        )
        return tiles, out
    order = torch.empty(pairs, dtype=torch.int32, device=x.device)
    tiles = _empty(x, most_tiles(pairs, experts, block_m), order, None, block_m)
    ids = topk_ids.contiguous()
    _few_kernel[(pairs,)](
        ids,
        ids if expert_map is None else expert_map.contiguous(),
        tiles.experts,
        tiles.starts,
        tiles.stops,
        tiles.count,
        order,
        x,
        out,
        pairs,
        0 if expert_map is None else len(expert_map),
        experts,
        len(tiles.experts),
        x.shape[1],
        x.stride(0),
        HAS_MAP=expert_map is not None,
        PAIRS=32 if pairs <= 32 else FEW,
        BLOCK_M=block_m,
        **how,
    )
    return tiles, out
