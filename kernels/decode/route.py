"""From the experts that tokens choose to tiles of tokens that share one: no synchronisation, no atomics.

A *pair* is one choice of one token: ``token * k + choice``. Pairs are put in the order of their experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from marlin_w4a16.kernels.decode.tiles import Tiles, bins_for, empty_tiles, end_tiles, most_tiles, write_tiles
from marlin_w4a16.kernels.record import scratch, submit

FEW = 128  # pairs up to which each is compared with all others
_BLOCK = 4096  # pairs looked at at a time


@triton.jit
def local_expert(ids, expert_map, at, in_range, known, experts, HAS_MAP: tl.constexpr):
    """The expert that pairs chose, -1 where it is none of these (``expert_map`` has ``known`` places)."""
    expert = tl.load(ids + at, mask=in_range, other=-1).to(tl.int64)
    if HAS_MAP:
        mapped = (expert >= 0) & (expert < known)
        expert = tl.where(mapped, tl.load(expert_map + expert, mask=in_range & mapped, other=0).to(tl.int64), -1)
    # what a mask leaves out cannot be -1 where ids are unsigned: it says so itself
    return tl.where(in_range & (expert >= 0) & (expert < experts), expert, -1).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "known", "experts"])
def _count_kernel(
    ids, expert_map, counts, pairs, known, experts, HAS_MAP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
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
    ids, expert_map, counts, tile_experts, tile_starts, tile_stops, count, order, places,
    pairs, known, experts, most,
    HAS_MAP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
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
        write_tiles(mine, first, last, start, start + own, tile_experts, tile_starts, tile_stops, BLOCK_M)
        place = start
        for begin in range(0, pairs, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            hit = (local_expert(ids, expert_map, at, at < pairs, known, experts, HAS_MAP) == mine).to(tl.int32)
            to = place + tl.cumsum(hit, 0) - 1
            tl.store(order + to, at, mask=hit > 0)
            tl.store(places + at, to, mask=hit > 0)
            place += tl.sum(hit)
    if mine == experts - 1:
        end_tiles(last, most, tile_experts, count)
        if start + own < pairs:  # some chose none of these experts
            for begin in range(0, pairs, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                tl.store(order + at, -1, mask=(at >= start + own) & (at < pairs))
                local = local_expert(ids, expert_map, at, at < pairs, known, experts, HAS_MAP) >= 0
                tl.store(places + at, -1, mask=(at < pairs) & ~local)


def early_launch(pdl: bool) -> dict[str, bool]:
    """How a kernel is compiled and launched that may begin before the one before it has ended."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def tiles_of_experts(
    topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int, pdl: bool = False
) -> Tiles:
    """The tiles of tokens that choose ``topk_ids`` ``[tokens, k]``."""
    ids = topk_ids.contiguous()
    order, places = (scratch(ids.numel(), torch.int32, ids.device) for _ in range(2))
    counts = scratch(experts, torch.int32, ids.device)
    tiles = empty_tiles(ids, most_tiles(ids.numel(), experts, block_m), order, places, block_m)
    known = 0 if expert_map is None else len(expert_map)
    of = (ids, ids if expert_map is None else expert_map.contiguous())
    how = {"HAS_MAP": expert_map is not None, "BLOCK": _BLOCK, "num_warps": 16, **early_launch(pdl)}
    submit(_count_kernel, (experts,), *of, counts, ids.numel(), known, experts, **how)
    submit(
        _expert_kernel, (experts,),
        *of, counts, *tiles.tables, order, tiles.places,
        ids.numel(), known, experts, len(tiles.experts),
        BINS=bins_for(experts), BLOCK_M=block_m, **how,
    )  # fmt: skip
    return tiles


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
    ids, expert_map, tile_experts, tile_starts, tile_stops, count, order, x, out,
    pairs, known, experts, most, k, stride_xm,
    HAS_MAP: tl.constexpr, CHOICES: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
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
    out = scratch((pairs, x.shape[1]), x.dtype, x.device)
    block = min(2048, triton.next_power_of_2(x.shape[1]))
    how = {"CHOICES": choices, "BLOCK": block, **early_launch(pdl)}
    if pairs > FEW:
        tiles = tiles_of_experts(topk_ids, expert_map, experts, block_m, pdl)
        submit(
            _gather_kernel, (x.shape[0], triton.cdiv(x.shape[1], block)),
            x, tiles.places, out, x.shape[1], x.stride(0), **how,
        )  # fmt: skip
        return tiles, out
    order = scratch(pairs, torch.int32, x.device)
    tiles = empty_tiles(x, most_tiles(pairs, experts, block_m), order, None, block_m)
    ids = topk_ids.contiguous()
    submit(
        _few_kernel, (pairs,),
        ids, ids if expert_map is None else expert_map.contiguous(), *tiles.tables, order, x, out,
        pairs, 0 if expert_map is None else len(expert_map), experts, len(tiles.experts), x.shape[1], x.stride(0),
        HAS_MAP=expert_map is not None, PAIRS=32 if pairs <= 32 else FEW, BLOCK_M=block_m, **how,
    )  # fmt: skip
    return tiles, out
