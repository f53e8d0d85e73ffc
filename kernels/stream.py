"""The FP4 linear of Hopper for more tokens, in Gluon: one producer warp feeds rings, the others decode and multiply.

The product is cut into units of ``rows`` weight rows, ``block_m`` tokens and ``64 * tiles`` columns; every program
takes an equal, contiguous run of them (stream-K: Osama et al., 2023), so no wave is left half empty. The decoded weight
is the register operand of wgmma. A tile of the output that lies in one run is finished in registers; the parts of the
others are summed by a second small kernel, always in the same order: equal bits on every run.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from marlin_w4a16.kernels.fragments import copy_to_shared, scale_pairs, unpack_words, write_tile
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.unpack import UNPACK_GAIN

X_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WORD_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
SCALE_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
_PRODUCER_REGISTERS = gl.constexpr(24)
_SUMS = 1024  # elements a program of the second kernel sums


@gluon.jit
def _copy_weight(
    words_desc, scales_desc, word_ring, scale_ring, bar, slot, row, at, BYTES: gl.constexpr, WORDS: gl.constexpr
):  # fmt: skip
    """Starts the copies of codes and scales of a unit; ``BYTES`` are those of all that fills its slot."""
    mbarrier.expect(bar, BYTES)
    copy_to_shared(words_desc, [row, at * 16, 0], bar, word_ring.index(slot))
    copy_to_shared(scales_desc, [row, at * WORDS, 0], bar, scale_ring.index(slot))


@gluon.jit
def _produce(
    x_desc, words_desc, scales_desc, x_ring, word_ring, scale_ring, full, empty, first, last, tiles_m, units,
    ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Copies what each unit needs into the rings, as slots become free."""
    R: gl.constexpr = ROWS // 64
    BYTES: gl.constexpr = TILES * (R * (2048 + WORDS * 128) + BLOCK_M * 128)
    # the weights do not depend on the kernel before: their first copies are under way before it ends
    early = gl.minimum(first + STAGES, last)
    for unit in range(first, early):
        slot = unit - first
        row = unit // units // tiles_m * R
        at = unit % units * TILES
        _copy_weight(words_desc, scales_desc, word_ring, scale_ring, full.index(slot), slot, row, at, BYTES, WORDS)
    gdc_wait()
    gdc_launch_dependents()
    slot = 0
    phase = 1
    for unit in range(first, last):
        tile = unit // units
        row = tile // tiles_m * R
        token = tile % tiles_m * BLOCK_M
        at = unit % units * TILES
        bar = full.index(slot)
        if unit >= early:
            mbarrier.wait(empty.index(slot), phase)
            _copy_weight(words_desc, scales_desc, word_ring, scale_ring, bar, slot, row, at, BYTES, WORDS)
        for j in gl.static_range(TILES):
            copy_to_shared(x_desc, [token, (at + j) * 64], bar, x_ring.index(slot * TILES + j))
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def _decode(
    word_ring, scale_ring, slot, j: gl.constexpr,
    ROWS: gl.constexpr, GROUP: gl.constexpr, kind: gl.constexpr, dtype: gl.constexpr, WORD_LAYOUT: gl.constexpr,
    SCALE_LAYOUT: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The operand ``[ROWS, 64]`` of column tile j of a slot: codes times block scales."""
    R: gl.constexpr = ROWS // 64
    WORDS: gl.constexpr = 32 // GROUP
    q = word_ring.index(slot).slice(j * 16, 16, dim=1).load(WORD_LAYOUT).reshape((R, 32, 4, 4))
    s = scale_ring.index(slot).slice(j * WORDS, WORDS, dim=1).load(SCALE_LAYOUT).reshape((R, 32, WORDS))
    # the scale words [R, 4 w, 8 g, WORDS] serve the four lanes t of a row
    p = scale_pairs(s, kind, dtype, GROUP).reshape((R, 32, 4))
    p = gl.convert_layout(p, gl.SliceLayout(2, q.type.layout), assert_trivial=True)
    q, p = gl.broadcast(q, p[:, :, None, :])
    a = unpack_words(q, p, kind, dtype).reshape((R, 4, 8, 4, 4, 2, 2, 2))
    # R w g t s p r h -> (R w r g) (s h t p)
    a = a.permute((0, 1, 6, 2, 4, 7, 3, 5)).reshape((ROWS, 64))
    return gl.convert_layout(a, layout, assert_trivial=True)


@gluon.jit
def _consume(
    x_ring, word_ring, scale_ring, full, empty, multiplier, bias, out, parts, m, n, first, last, tiles_m, units,
    kind: gl.constexpr, dtype: gl.constexpr, GROUP: gl.constexpr, GAIN: gl.constexpr, HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
    WGMMA: gl.constexpr, OVERLAP: gl.constexpr, WORD_LAYOUT: gl.constexpr, SCALE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiplies unit after unit, and writes a tile of the output when its columns or the run end."""
    acc_layout: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        if WGMMA
        else gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 2)
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, acc_layout)
    block_n = first // units // tiles_m
    block_m = first // units % tiles_m
    step = first % units
    begun = step
    slab = 2 * gl.program_id(0)
    slot = 0
    phase = 0
    for unit in range(first, last):
        mbarrier.wait(full.index(slot), phase)
        for j in gl.static_range(TILES):
            a = _decode(
                word_ring, scale_ring, slot, j, ROWS, GROUP, kind, dtype, WORD_LAYOUT, SCALE_LAYOUT, a_layout
            )  # fmt: skip
            b = x_ring.index(slot * TILES + j).permute((1, 0))
            if WGMMA:
                # At most one product is in flight while the next operand is decoded, and none when the unit ends: the
                # operands of an unrolled loop have registers of their own, but its next turn takes the same again.
                acc = warpgroup_mma(a, b, acc, is_async=True)
                acc = warpgroup_mma_wait(1 if OVERLAP and j < TILES - 1 else 0, deps=(acc,))
            else:
                acc = mma_v2(a, b.load(b_layout), acc)
        mbarrier.arrive(empty.index(slot), count=1)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1
        step += 1
        if (step == units) | (unit == last - 1):
            if (begun == 0) & (step == units):
                write_tile(
                    acc, multiplier, bias, out, block_n * ROWS, block_m * BLOCK_M, m, n, GAIN, HAS_BIAS
                )  # fmt: skip
            else:  # its part, to be summed later
                row = gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
                token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, acc_layout))
                part = parts + slab.to(gl.int64) * (ROWS * BLOCK_M)
                gl.store(part + row[:, None] * BLOCK_M + token[None, :], acc)
            acc = gl.zeros((ROWS, BLOCK_M), gl.float32, acc_layout)
            slab = 2 * gl.program_id(0) + 1
            begun = 0
            step = 0
            block_m += 1
            if block_m == tiles_m:
                block_m = 0
                block_n += 1


@gluon.jit(do_not_specialize=["m", "tiles_m", "units", "total", "programs"])
def _stream_kernel(
    x_desc,
    words_desc,
    scales_desc,
    multiplier,
    bias,
    out,
    parts,
    m,
    n,
    tiles_m,
    units,
    total,
    programs,
    kind: gl.constexpr,
    GROUP: gl.constexpr,
    GAIN: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
    WGMMA: gl.constexpr,
    OVERLAP: gl.constexpr,
    WORD_LAYOUT: gl.constexpr,
    SCALE_LAYOUT: gl.constexpr,
):
    R: gl.constexpr = ROWS // 64
    WORDS: gl.constexpr = 32 // GROUP
    dtype: gl.constexpr = x_desc.dtype
    pid = gl.program_id(0).to(gl.int64)
    first = (pid * total // programs).to(gl.int32)
    last = ((pid + 1) * total // programs).to(gl.int32)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES * TILES, BLOCK_M, 64], x_desc.layout)
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES, R, 16 * TILES, 32], words_desc.layout)
    scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES, R, WORDS * TILES, 32], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring, word_ring, scale_ring, full, empty, multiplier, bias, out, parts, m, n, first, last,
                    tiles_m, units, kind, dtype, GROUP, GAIN, HAS_BIAS, ROWS, BLOCK_M, TILES, STAGES, WARPS, WGMMA,
                    OVERLAP, WORD_LAYOUT, SCALE_LAYOUT,
                ),
            ),
            (
                _produce,
                (
                    x_desc, words_desc, scales_desc, x_ring, word_ring, scale_ring, full, empty, first, last,
                    tiles_m, units, ROWS, BLOCK_M, TILES, STAGES, WORDS,
                ),
            ),
        ],
        [1],
        [_PRODUCER_REGISTERS],
    )  # fmt: skip


@triton.jit(do_not_specialize=["m", "tiles_m", "units", "total", "programs"])
def _sum_kernel(
    parts,
    multiplier,
    bias,
    out,
    m,
    n,
    tiles_m,
    units,
    total,
    programs,
    GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    gdc_wait()
    gdc_launch_dependents()
    tile = tl.program_id(0)
    begin = tile.to(tl.int64) * units
    low = ((begin + 1) * programs - 1) // total  # the programs that met the first and the last unit of the tile
    high = ((begin + units) * programs - 1) // total
    if low < high:
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.arange(0, BLOCK_M)
        at = row[:, None] * BLOCK_M + token[None, :]
        acc = tl.zeros((BLOCK, BLOCK_M), tl.float32)
        for program in range(low, high + 1):
            slab = 2 * program + (program * total // programs < begin)
            acc += tl.load(parts + slab * (ROWS * BLOCK_M) + at)
        rows_n = (tile // tiles_m) * ROWS + row
        rows_m = (tile % tiles_m) * BLOCK_M + token
        in_n = rows_n < n
        acc *= (tl.load(multiplier + rows_n, mask=in_n, other=0.0) * GAIN)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias + rows_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        to = rows_m[None, :].to(tl.int64) * n + rows_n[:, None]
        tl.store(out + to, acc.to(out.dtype.element_ty), mask=in_n[:, None] & (rows_m < m)[None, :])


def _lines(rows: int, warps: int, words: int) -> gl.DistributedLinearLayout:
    """Where a column of tiles lies in registers, as ``[rows / 64, lines, 32]``, in lines of 32 words as copied.

    A tile holds words ``[4 w, 8 g, 4 t, 4 s]``, or scale words ``[4 w, 8 g, words]``, which the lanes t of a row share.
    """
    spread = (warps // 4).bit_length() - 1  # tiles go over warpgroups first, the rest over registers
    tiles = [[1 << b, 0, 0] for b in range((rows // 64).bit_length() - 1)]
    lines = 16 if words == 4 else words
    bits = [[0, 0, 1 << b] for b in range(5)] + [[0, 1 << b, 0] for b in range(lines.bit_length() - 1)]
    inner = words.bit_length() - 1
    threads = ([] if words == 4 else [[0, 0, 0], [0, 0, 0]]) + bits[inner:]
    return gl.DistributedLinearLayout(
        reg_bases=bits[:inner] + tiles[spread:],
        lane_bases=threads[:5],
        warp_bases=threads[5:] + tiles[:spread],
        block_bases=[],
        shape=[rows // 64, lines, 32],
    )


@functools.cache
def stream_constants(launch: Stream, group: int) -> dict[str, Any]:
    """The compile-time parameters of a launch that follow from it; kept, for they take 30 us to make."""
    return {
        "GROUP": group,
        "ROWS": launch.rows,
        "BLOCK_M": launch.block_m,
        "TILES": launch.tiles,
        "STAGES": launch.stages,
        "WARPS": launch.num_warps,
        "WGMMA": launch.wgmma,
        "OVERLAP": launch.overlap,
        "WORD_LAYOUT": _lines(launch.rows, launch.num_warps, 4),
        "SCALE_LAYOUT": _lines(launch.rows, launch.num_warps, 32 // group),
    }


def stream(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Stream) -> None:
    """``x @ weight.T + bias`` into ``out``, for x ``[m, k]``: rows aligned to 16 bytes, columns adjacent."""
    m, n = out.shape
    row_tiles, k_tiles = packed.words.shape[:2]
    lines = 32 // packed.group
    tiles_m, units = triton.cdiv(m, launch.block_m), triton.cdiv(k_tiles, launch.tiles)
    out_tiles = triton.cdiv(n, launch.rows) * tiles_m
    sizes = (tiles_m, units, out_tiles * units, launch.programs)
    split = out_tiles % launch.programs != 0
    slabs = (2 * launch.programs, launch.rows, launch.block_m)
    parts = torch.empty(slabs, dtype=torch.float32, device=x.device) if split else out
    words = packed.words.view(row_tiles, k_tiles * 16, 32)
    scales = packed.scales.view(torch.int32).view(row_tiles, k_tiles * lines, 32)
    _stream_kernel[(launch.programs,)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [launch.block_m, 64], X_SHARED),
        TensorDescriptor.from_tensor(words, [launch.rows // 64, 16 * launch.tiles, 32], WORD_SHARED),
        TensorDescriptor.from_tensor(scales, [launch.rows // 64, lines * launch.tiles, 32], SCALE_SHARED),
        packed.multiplier,
        packed.multiplier if bias is None else bias,
        out,
        parts,
        m,
        n,
        *sizes,
        kind=packed.kind,
        GAIN=UNPACK_GAIN[packed.kind],
        HAS_BIAS=bias is not None,
        **stream_constants(launch, packed.group),
        num_warps=launch.num_warps,
        launch_pdl=True,
    )
    if split:
        _sum(parts, packed, bias, out, launch, sizes)


def _sum(
    parts: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Stream, sizes: tuple[int, ...]
) -> None:
    """Adds the parts of the tiles that several programs met, and finishes these."""
    m, n = out.shape
    _, units, total, _ = sizes
    block = min(launch.rows, max(16, _SUMS // launch.block_m))
    _sum_kernel[(total // units, launch.rows // block)](
        parts,
        packed.multiplier,
        packed.multiplier if bias is None else bias,
        out,
        m,
        n,
        *sizes,
        GAIN=UNPACK_GAIN[packed.kind],
        HAS_BIAS=bias is not None,
        ROWS=launch.rows,
        BLOCK_M=launch.block_m,
        BLOCK=block,
        num_warps=4,
        launch_pdl=True,
    )
