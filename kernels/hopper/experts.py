"""One product of a mixture of experts on Hopper, in Gluon: the loop of stream.py over tiles of tokens by expert.

Programs take blocks of rows of the tiles (route.py) in turn, all columns of each; one warp copies, the others decode
and multiply. Tokens come sorted by expert, so that a tile is one box for the copy engine: what it reads past the end of
its expert's tokens is multiplied, and not stored.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.decode import activate as in_triton
from marlin_w4a16.kernels.decode.activate import activation_constants
from marlin_w4a16.kernels.decode.fragments import copy_to_shared
from marlin_w4a16.kernels.decode.route import Tiles
from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN
from marlin_w4a16.kernels.hopper.stream import (
    SCALE_SHARED,
    WORD_SHARED,
    X_SHARED,
    copy_weight,
    decode_tile,
    multiply_unit,
    open_rings,
    stream_constants,
)
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.layout import PackedFP4

activate = gluon.jit(in_triton.activate.fn)
_PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def _produce(
    x_desc, words_desc, scales_desc, x_ring, word_ring, scale_ring, full, empty, tile_experts, tile_starts, items,
    experts, row_blocks, row_tiles, units, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Copies what each unit needs into the rings, as slots become free."""
    R: gl.constexpr = ROWS // 64
    BYTES: gl.constexpr = TILES * (R * (2048 + WORDS * 128) + BLOCK_M * 128)
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // row_blocks
        expert = gl.minimum(gl.load(tile_experts + tile), experts - 1)  # rows of no expert are zeros in the end
        start = gl.load(tile_starts + tile)
        row = expert * row_tiles + item % row_blocks * R
        for at in range(units):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            copy_weight(
                words_desc, scales_desc, word_ring, scale_ring, bar, slot, row, at * TILES, BYTES, WORDS
            )  # fmt: skip
            for j in gl.static_range(TILES):
                copy_to_shared(x_desc, [start, (at * TILES + j) * 64], bar, x_ring.index(slot * TILES + j))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _write(
    acc, multiplier, bias, weights, order, out, expert, experts, first_n, start, stop, n, width, GAIN: gl.constexpr,
    HAS_BIAS: gl.constexpr, WEIGHTED: gl.constexpr, TAIL: gl.constexpr, TO_PAIRS: gl.constexpr,
    FUNCTION: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr, GATE_LIMIT: gl.constexpr,
    UP_LIMIT: gl.constexpr, UP_OFFSET: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The epilogue: multiplier, routing weight, bias and activation in float32, one rounding."""
    layout: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    rows = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    of_expert = gl.minimum(expert, experts - 1).to(gl.int64) * n
    y = acc * (gl.load(multiplier + of_expert + rows, mask=rows < n, other=0.0) * GAIN)[:, None]
    if WEIGHTED is not None:
        place = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
        pair = gl.load(order + place, mask=place < stop, other=0)
        weight = gl.load(weights + pair).to(gl.float32)[None, :]
    if WEIGHTED == "input":
        y *= weight
    if HAS_BIAS:
        y += gl.load(bias + of_expert + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
    if WEIGHTED == "output":
        y *= weight
    if FUNCTION is not None:
        y = activate(y, FUNCTION, GATED, ALPHA, GATE_LIMIT, UP_LIMIT, UP_OFFSET)
    if TAIL:
        y = gl.where(expert < experts, y, 0.0)
    out_layout: gl.constexpr = y.type.layout if OUT_LAYOUT is None else OUT_LAYOUT
    if OUT_LAYOUT is not None:
        width = width // 8 * 8  # which it is; the compiler then knows
    y = gl.convert_layout(y.to(out.dtype.element_ty), out_layout)
    columns = first_n // ROWS * y.shape[0] + gl.arange(0, y.shape[0], gl.SliceLayout(1, out_layout))
    to = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, out_layout))
    inside = to < stop
    if TO_PAIRS:
        to = gl.load(order + to, mask=inside, other=0)
    gl.store(
        out + to.to(gl.int64)[None, :] * width + columns[:, None], y, mask=inside[None, :] & (columns < width)[:, None]
    )


@gluon.jit
def _consume(
    x_ring, word_ring, scale_ring, full, empty, multiplier, bias, weights, tile_experts, tile_starts, tile_stops, order,
    out, items, n, width, experts, row_blocks, units, kind: gl.constexpr, dtype: gl.constexpr, GROUP: gl.constexpr,
    GAIN: gl.constexpr, HAS_BIAS: gl.constexpr, WEIGHTED: gl.constexpr, TAIL: gl.constexpr,
    TO_PAIRS: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr,
    GATE_LIMIT: gl.constexpr, UP_LIMIT: gl.constexpr, UP_OFFSET: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, WGMMA: gl.constexpr,
    OVERLAP: gl.constexpr, WORD_LAYOUT: gl.constexpr, SCALE_LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiplies unit after unit, and writes a block of rows when its columns end."""
    acc_layout: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        if WGMMA
        else gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, acc_layout)
    programs = gl.num_programs(0)
    item = gl.program_id(0)
    steps = (items - item + programs - 1) // programs * units
    at = 0
    slot = 0
    phase = 0
    a = acc
    if OVERLAP:
        mbarrier.wait(full.index(0), 0, pred=steps > 0)
        a = decode_tile(word_ring, scale_ring, 0, 0, GROUP, kind, dtype, WORD_LAYOUT, SCALE_LAYOUT, a_layout)
    for step in range(steps):
        acc, a, slot, phase = multiply_unit(
            acc, a, slot, phase, step > 0, step + 1 < steps, x_ring, word_ring, scale_ring, full, empty, kind, dtype,
            GROUP, TILES, STAGES, WGMMA, OVERLAP, WORD_LAYOUT, SCALE_LAYOUT,
        )  # fmt: skip
        at += 1
        if at == units:
            if OVERLAP and TILES == 2:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            tile = item // row_blocks
            _write(
                acc, multiplier, bias, weights, order, out, gl.load(tile_experts + tile), experts,
                item % row_blocks * ROWS, gl.load(tile_starts + tile), gl.load(tile_stops + tile), n, width, GAIN,
                HAS_BIAS, WEIGHTED, TAIL, TO_PAIRS, FUNCTION, GATED, ALPHA, GATE_LIMIT, UP_LIMIT, UP_OFFSET,
                OUT_LAYOUT,
            )  # fmt: skip
            acc = gl.zeros((ROWS, BLOCK_M), gl.float32, acc_layout)
            at = 0
            item += programs


_SIZES = ["n", "width", "experts", "row_blocks", "row_tiles", "units"]


@gluon.jit(do_not_specialize=_SIZES)
def _stream_experts_kernel(
    x_desc,
    words_desc,
    scales_desc,
    multiplier,
    bias,
    weights,
    tile_experts,
    tile_starts,
    tile_stops,
    count,
    order,
    out,
    n,
    width,
    experts,
    row_blocks,
    row_tiles,
    units,
    kind: gl.constexpr,
    GROUP: gl.constexpr,
    GAIN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    WEIGHTED: gl.constexpr,
    TAIL: gl.constexpr,
    TO_PAIRS: gl.constexpr,
    FUNCTION: gl.constexpr,
    GATED: gl.constexpr,
    ALPHA: gl.constexpr,
    GATE_LIMIT: gl.constexpr,
    UP_LIMIT: gl.constexpr,
    UP_OFFSET: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    WGMMA: gl.constexpr,
    OVERLAP: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    SCALE_LAYOUT: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
):
    WORDS: gl.constexpr = 32 // GROUP
    dtype: gl.constexpr = x_desc.dtype
    x_ring, word_ring, scale_ring, full, empty = open_rings(
        x_desc, words_desc, scales_desc, ROWS // 64, BLOCK_M, TILES, STAGES, WORDS
    )
    # The tables and the tokens are those of the kernel before. The next one is not called early: where its programs are
    # resident, some of this one's may find no room until others end, and each has its share to do.
    gdc_wait()
    items = gl.load(count) * row_blocks
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring, word_ring, scale_ring, full, empty, multiplier, bias, weights, tile_experts, tile_starts,
                    tile_stops, order, out, items, n, width, experts, row_blocks, units, kind, dtype, GROUP, GAIN,
                    HAS_BIAS, WEIGHTED, TAIL, TO_PAIRS, FUNCTION, GATED, ALPHA, GATE_LIMIT, UP_LIMIT,
                    UP_OFFSET, ROWS, BLOCK_M, TILES, STAGES, WARPS, WGMMA, OVERLAP, WORD_LAYOUT, SCALE_LAYOUT,
                    OUT_LAYOUT,
                ),
            ),
            (
                _produce,
                (
                    x_desc, words_desc, scales_desc, x_ring, word_ring, scale_ring, full, empty, tile_experts,
                    tile_starts, items, experts, row_blocks, row_tiles, units, ROWS, BLOCK_M, TILES, STAGES, WORDS,
                ),
            ),
        ],
        [1],
        [_PRODUCER_REGISTERS],
    )  # fmt: skip


@functools.cache
def _out_layout(rows: int, warps: int, nbytes: int, aligned: bool) -> gl.BlockedLayout | None:
    """Sixteen bytes a lane along the rows of a finished block, where the rows of the output are on that grid."""
    each = 16 // nbytes
    lanes = min(rows // each, 32)
    return gl.BlockedLayout([each, 1], [lanes, 32 // lanes], [1, warps], [0, 1]) if aligned else None


def stream_experts(
    x: Tensor,
    packed: PackedFP4,
    bias: Tensor | None,
    out: Tensor,
    tiles: Tiles,
    launch: Stream,
    *,
    activation: Activation | None = None,
    weights: Tensor | None = None,
    weighted: str | None = None,
    to_pairs: bool = False,
) -> None:
    """The rows of x times the transposed weight of their experts, into ``out``.

    Args:
        x: ``[places, k]`` in the order of the tiles: rows aligned to 16 bytes, columns adjacent.
        packed: ``[experts, n, k]``, contiguous.
        bias: ``[experts, n]`` or None.
        out: ``[places or pairs, width]``, where width is n, or n / 2 behind a gated activation.
        tiles: of ``launch.block_m`` places.
        launch: the compiled form; its programs are those of a multiprocessor at a time.
        activation: what follows the product, or None.
        weights: routing weights of the pairs, or None.
        weighted: where they are applied: ``"input"`` (before the bias) or ``"output"``.
        to_pairs: rows of ``out`` are pairs, not places.
    """
    experts, row_tiles, k_tiles = packed.words.shape[:3]
    lines, width = 32 // packed.group, out.shape[1]
    row_blocks = triton.cdiv(packed.n, launch.rows)
    words = packed.words.view(experts * row_tiles, k_tiles * 16, 32)
    scales = packed.scales.view(torch.int32).view(experts * row_tiles, k_tiles * lines, 32)
    constants = stream_constants(launch, packed.group, False)
    rows = launch.rows // 2 if activation is not None and activation.gated else launch.rows
    layout = _out_layout(rows, launch.num_warps, out.element_size(), width % 8 == 0)
    _stream_experts_kernel[(min(launch.programs, len(tiles.experts) * row_blocks),)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [launch.block_m, 64], X_SHARED),
        TensorDescriptor.from_tensor(words, [launch.rows // 64, 16 * launch.tiles, 32], WORD_SHARED),
        TensorDescriptor.from_tensor(scales, [launch.rows // 64, lines * launch.tiles, 32], SCALE_SHARED),
        packed.multiplier,
        packed.multiplier if bias is None else bias,
        packed.multiplier if weights is None else weights,
        tiles.experts,
        tiles.starts,
        tiles.stops,
        tiles.count,
        tiles.experts if tiles.order is None else tiles.order,
        out,
        packed.n,
        width,
        experts,
        row_blocks,
        row_tiles,
        triton.cdiv(k_tiles, launch.tiles),
        kind=packed.kind,
        GAIN=UNPACK_GAIN[packed.kind],
        HAS_BIAS=bias is not None,
        WEIGHTED=weighted if weights is not None else None,
        TAIL=tiles.order is None,
        TO_PAIRS=to_pairs,
        **activation_constants(activation),
        **{**constants, "OUT_LAYOUT": layout},
        num_warps=launch.num_warps,
        maxnreg=launch.registers,
        launch_pdl=True,
    )
