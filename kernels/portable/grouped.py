"""The portable kernel of experts, for SM80 to SM90: rows times the FP4 weight of the expert that each belongs to.

It serves both products of a mixture (moe.py) and the grouped linear. A program takes some rows of one expert and a tile
of the tokens that chose it (route.py); as in linear.py the decoded weight is the left operand, in registers,
and the activation of a mixture follows in the epilogue.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.decode.activate import activate
from marlin_w4a16.kernels.decode.route import local_expert
from marlin_w4a16.kernels.decode.tiles import Tiles
from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN, lane_offsets, load_operand
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.linear import wait_for_products
from marlin_w4a16.kernels.record import submit

FEW = Launch(64, 16, 128, 1, 4, 4)  # where every pair has a tile of its own


@triton.jit(do_not_specialize=["n", "row_blocks", "row_tiles", "k_tiles", "experts", "known"])
def _grouped_kernel(
    x, words, scales, multiplier, bias, topk_weights, tile_experts, tile_starts, tile_stops, order, expert_map, out,
    n, k, row_blocks, row_tiles, k_tiles, experts, known, stride_xm,
    kind: tl.constexpr, GROUP: tl.constexpr, GAIN: tl.constexpr, CHOICES: tl.constexpr, DIRECT: tl.constexpr,
    ORDERED: tl.constexpr, HAS_MAP: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTED: tl.constexpr,
    activation: tl.constexpr, launch: tl.constexpr, PTX: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = launch.block_n
    BLOCK_M: tl.constexpr = launch.block_m
    R: tl.constexpr = BLOCK_N // 64
    C: tl.constexpr = launch.block_k // 64
    SCALES: tl.constexpr = 32 // GROUP  # scale words of a lane in a tile
    pid = tl.program_id(0)
    tile = pid // row_blocks
    block_n = pid % row_blocks
    if DIRECT:  # every pair is a tile
        expert = local_expert(tile_experts, expert_map, tile, True, known, experts, HAS_MAP)
        pair = tl.where(tl.arange(0, BLOCK_M) == 0, tile, -1)
    else:
        expert = tl.load(tile_experts + tile)
    if expert < 0:
        return
    if not DIRECT:
        pair = tl.load(tile_starts + tile) + tl.arange(0, BLOCK_M)
        inside = pair < tl.load(tile_stops + tile)
        pair = tl.load(order + pair, mask=inside, other=-1) if ORDERED else tl.where(inside, pair, -1)
    in_m = (pair >= 0)[None, :]
    last = tl.where(expert < experts, k_tiles, 0)  # the rows of no expert are zeros
    expert = tl.minimum(expert, experts - 1)

    tile_row = tl.minimum(block_n * R + tl.arange(0, R), row_tiles - 1)[:, None, None] * k_tiles
    word_at, scale_at = lane_offsets(GROUP)
    of_expert = expert.to(tl.int64) * row_tiles * k_tiles
    words += of_expert * 512
    scales += of_expert * (32 * SCALES)

    x_rows = x + (pair // CHOICES)[None, :].to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(0, last, C, num_stages=launch.num_stages):
        for c in tl.static_range(C):
            tile = step + c
            at = tile_row + (tile if C == 1 else tl.minimum(tile, k_tiles - 1))
            a = load_operand(words, scales, at, word_at, scale_at, kind, x.dtype.element_ty, GROUP, PTX, WGMMA)
            at_k = tile * 64 + tl.arange(0, 64)
            b = tl.load(x_rows + at_k[:, None], mask=in_m & (at_k[:, None] < k), other=0.0)
            acc = tl.dot(a, b, acc)
        if WGMMA:
            acc = wait_for_products(acc)

    rows_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = rows_n < n
    at_n = expert.to(tl.int64) * n + rows_n
    y = acc * (tl.load(multiplier + at_n, mask=in_n, other=0.0) * GAIN)[:, None]
    if WEIGHTED is not None:
        weight = tl.load(topk_weights + pair, mask=pair >= 0, other=0.0).to(tl.float32)[None, :]
    if WEIGHTED == "input":
        y *= weight
    if HAS_BIAS:
        y += tl.load(bias + at_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
    if WEIGHTED == "output":
        y *= weight
    y = activate(y, activation)
    width = n * y.shape[0] // BLOCK_N
    rows_y = block_n * y.shape[0] + tl.arange(0, y.shape[0])
    to = out + pair[None, :].to(tl.int64) * width
    tl.store(to + rows_y[:, None], y.to(out.dtype.element_ty), mask=in_m & (rows_y < width)[:, None])


def grouped_product(
    x: Tensor,
    packed: PackedFP4,
    bias: Tensor | None,
    out: Tensor,
    tiles: Tiles | Tensor,
    launch: Launch,
    *,
    choices: int,
    ptx: bool,
    wgmma: bool,
    activation: Activation | None = None,
    weights: Tensor | None = None,
    weighted: str | None = None,
    expert_map: Tensor | None = None,
) -> None:
    """One product: row ``pair // choices`` of x for each pair, its row ``pair`` of ``out``."""
    if x.stride(1) != 1:
        x = x.contiguous()
    packed = packed.contiguous()
    experts, row_tiles, k_tiles = packed.words.shape[:3]
    row_blocks = triton.cdiv(packed.n, launch.block_n)
    direct = isinstance(tiles, Tensor)
    table, order = ((tiles,) * 3, None) if isinstance(tiles, Tensor) else (tiles.tables[:3], tiles.order)
    submit(
        _grouped_kernel, (table[0].numel() * row_blocks,),
        x, packed.words, packed.scales.view(torch.int32), *packed.per_row(bias),
        packed.multiplier if weights is None else weights, *table, table[0] if order is None else order,
        table[0] if expert_map is None else expert_map, out,
        packed.n, packed.k, row_blocks, row_tiles, k_tiles, experts,
        0 if expert_map is None else len(expert_map), x.stride(0),
        kind=packed.kind, GROUP=packed.group, GAIN=UNPACK_GAIN[packed.kind], CHOICES=choices, DIRECT=direct,
        ORDERED=order is not None, HAS_MAP=direct and expert_map is not None, HAS_BIAS=bias is not None,
        WEIGHTED=None if weights is None else weighted, activation=activation, launch=launch, PTX=ptx, WGMMA=wgmma,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
