"""The FP4 linear of Hopper for more tokens, in Gluon: one producer warp feeds rings, the others decode and multiply.

Which program meets which columns of which tile of the output is in schedule.py. The decoded weight is the register
operand of wgmma. A whole tile is finished in registers; parts are summed by a second small kernel, always in the same
order: equal bits on every run.
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

from marlin_w4a16.kernels.decode.fragments import copy_to_shared, scale_pairs, unpack_words, write_tile
from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN
from marlin_w4a16.kernels.hopper.schedule import place, share, unit
from marlin_w4a16.kernels.launch import Stream, division
from marlin_w4a16.kernels.layout import PackedFP4

X_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
WORD_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
SCALE_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
_PRODUCER_REGISTERS = gl.constexpr(24)
_HALF_REGISTERS = 128  # of a multiprocessor, so that the next kernel starts beside a program of four warps
_SUMS = 1024  # elements a program of the second kernel sums


@gluon.jit
def open_rings(
    x_desc, words_desc, scales_desc, R: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr,
    STAGES: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """Shared memory for units of tokens, codes and scales, and the barriers of its slots: full, and empty again."""
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * TILES, BLOCK_M, 64], x_desc.layout)
    word_ring = gl.allocate_shared_memory(gl.int32, [STAGES, R, 16 * TILES, 32], words_desc.layout)
    scale_ring = gl.allocate_shared_memory(gl.int32, [STAGES, R, WORDS * TILES, 32], scales_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return x_ring, word_ring, scale_ring, full, empty


@gluon.jit
def copy_weight(
    words_desc, scales_desc, word_ring, scale_ring, bar, slot, row, at, BYTES: gl.constexpr, WORDS: gl.constexpr
):  # fmt: skip
    """Starts the copies of codes and scales of a unit; ``BYTES`` are those of all that fills its slot."""
    mbarrier.expect(bar, BYTES)
    copy_to_shared(words_desc, [row, at * 16, 0], bar, word_ring.index(slot))
    copy_to_shared(scales_desc, [row, at * WORDS, 0], bar, scale_ring.index(slot))


@gluon.jit
def _produce(
    x_desc, words_desc, scales_desc, x_ring, word_ring, scale_ring, full, empty, tiles_n, tiles_m, units, whole, rest,
    sharers, programs, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    WORDS: gl.constexpr,
):  # fmt: skip
    """Copies what each unit needs into the rings, as slots become free."""
    R: gl.constexpr = ROWS // 64
    BYTES: gl.constexpr = TILES * (R * (2048 + WORDS * 128) + BLOCK_M * 128)
    pid = gl.program_id(0)
    own, first, last = share(pid, units, whole, rest, sharers, programs)
    steps = own * units + last - first
    # the weights do not depend on the kernel before: their first copies are under way before it ends
    early = gl.minimum(STAGES, steps)
    for step in range(early):
        block_n, _, at = unit(step, pid, own, first, tiles_n, tiles_m, units, whole, programs)
        copy_weight(
            words_desc, scales_desc, word_ring, scale_ring, full.index(step), step, block_n * R, at * TILES, BYTES,
            WORDS,
        )  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    slot = 0
    phase = 1
    for step in range(steps):
        block_n, block_m, at = unit(step, pid, own, first, tiles_n, tiles_m, units, whole, programs)
        bar = full.index(slot)
        if step >= early:
            mbarrier.wait(empty.index(slot), phase)
            copy_weight(
                words_desc, scales_desc, word_ring, scale_ring, bar, slot, block_n * R, at * TILES, BYTES, WORDS
            )
        for j in gl.static_range(TILES):
            copy_to_shared(x_desc, [block_m * BLOCK_M, (at * TILES + j) * 64], bar, x_ring.index(slot * TILES + j))
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def _load(word_ring, scale_ring, slot, j, WORDS: gl.constexpr, WORD_LAYOUT: gl.constexpr, SCALE_LAYOUT: gl.constexpr):
    """Words and scale words of column tile j of a slot."""
    q = word_ring.index(slot).slice(j * 16, 16, dim=1).load(WORD_LAYOUT)
    return q, scale_ring.index(slot).slice(j * WORDS, WORDS, dim=1).load(SCALE_LAYOUT)


@gluon.jit
def _unpack(q, s, GROUP: gl.constexpr, kind: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """The operand ``[rows, 64]``: codes times block scales."""
    R: gl.constexpr = q.shape[0]
    q = q.reshape((R, 32, 4, 4))
    # the scale words [R, 4 w, 8 g, 32 / GROUP] serve the four lanes t of a row
    p = scale_pairs(s.reshape((R, 32, 32 // GROUP)), kind, dtype, GROUP).reshape((R, 32, 4))
    p = gl.convert_layout(p, gl.SliceLayout(2, q.type.layout), assert_trivial=True)
    q, p = gl.broadcast(q, p[:, :, None, :])
    a = unpack_words(q, p, kind, dtype).reshape((R, 4, 8, 4, 4, 2, 2, 2))
    # R w g t s p r h -> (R w r g) (s h t p)
    a = a.permute((0, 1, 6, 2, 4, 7, 3, 5)).reshape((R * 64, 64))
    return gl.convert_layout(a, layout, assert_trivial=True)


@gluon.jit
def decode_tile(
    word_ring, scale_ring, slot, j, GROUP: gl.constexpr, kind: gl.constexpr, dtype: gl.constexpr,
    WORD_LAYOUT: gl.constexpr, SCALE_LAYOUT: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """The operand of column tile j of a slot."""
    q, s = _load(word_ring, scale_ring, slot, j, 32 // GROUP, WORD_LAYOUT, SCALE_LAYOUT)
    return _unpack(q, s, GROUP, kind, dtype, layout)


@gluon.jit
def multiply_unit(
    acc, a, slot, phase, follows, goes_on, x_ring, word_ring, scale_ring, full, empty, kind: gl.constexpr,
    dtype: gl.constexpr, GROUP: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, WGMMA: gl.constexpr,
    OVERLAP: gl.constexpr, WORD_LAYOUT: gl.constexpr, SCALE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Adds the products of a slot to ``acc``; and the operand of the next unit, its slot and its phase.

    Where products overlap, ``a`` is the operand of the first column tile of this unit, and with TILES == 2 the last
    product is still under way. ``follows`` and ``goes_on`` say whether there were and will be other units.
    """
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc.type.layout, 2)
    before = gl.where(slot == 0, STAGES - 1, slot - 1)
    after = slot + 1
    after_phase = phase
    if after == STAGES:
        after = 0
        after_phase ^= 1
    if not OVERLAP:
        mbarrier.wait(full.index(slot), phase)
    for j in gl.static_range(TILES):
        b = x_ring.index(slot * TILES + j).permute((1, 0))
        if OVERLAP:
            # One product is under way while the next operand is decoded. That is loaded after the wait, so that
            # nothing writes registers which the product before still reads (see below).
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if j == 0:
                mbarrier.arrive(empty.index(before), count=1, pred=follows)
            if j < TILES - 1:
                a = decode_tile(
                    word_ring, scale_ring, slot, j + 1, GROUP, kind, dtype, WORD_LAYOUT, SCALE_LAYOUT, a_layout
                )
            else:
                mbarrier.wait(full.index(after), after_phase, pred=goes_on)
                a = decode_tile(
                    word_ring, scale_ring, after, 0, GROUP, kind, dtype, WORD_LAYOUT, SCALE_LAYOUT, a_layout
                )
        else:
            operand = decode_tile(
                word_ring, scale_ring, slot, j, GROUP, kind, dtype, WORD_LAYOUT, SCALE_LAYOUT, a_layout
            )
            if WGMMA:
                acc = warpgroup_mma(operand, b, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            else:
                acc = mma_v2(operand, b.load(b_layout), acc)
    if not OVERLAP:
        mbarrier.arrive(empty.index(slot), count=1)
    elif TILES > 2:
        # ptxas does not know, from one turn of a loop to the next, what a product still reads. Two operands take
        # turns in two sets of registers; of more, the first may be given those of the last.
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, a, after, after_phase


@gluon.jit
def _consume(
    x_ring, word_ring, scale_ring, full, empty, multiplier, bias, out, parts, m, n, tiles_n, tiles_m, units, whole,
    rest, sharers, programs, kind: gl.constexpr, dtype: gl.constexpr, GROUP: gl.constexpr, GAIN: gl.constexpr,
    HAS_BIAS: gl.constexpr, ROWS: gl.constexpr, BLOCK_M: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, WGMMA: gl.constexpr, OVERLAP: gl.constexpr, WORD_LAYOUT: gl.constexpr,
    SCALE_LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiplies unit after unit, and writes a tile of the output when its columns or the share end."""
    acc_layout: gl.constexpr = (
        gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
        if WGMMA
        else gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    out_layout: gl.constexpr = acc_layout if OUT_LAYOUT is None else OUT_LAYOUT
    if OUT_LAYOUT is not None:
        n = n // 8 * 8  # which it is; the compiler then knows
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, acc_layout)
    pid = gl.program_id(0)
    own, first, last = share(pid, units, whole, rest, sharers, programs)
    steps = own * units + last - first
    tile = gl.where(own > 0, pid, whole + first // units)
    at = gl.where(own > 0, 0, first % units)
    begun = at
    slot = 0
    phase = 0
    a = acc
    if OVERLAP:
        mbarrier.wait(full.index(0), 0)
        a = decode_tile(word_ring, scale_ring, 0, 0, GROUP, kind, dtype, WORD_LAYOUT, SCALE_LAYOUT, a_layout)
    for step in range(steps):
        acc, a, slot, phase = multiply_unit(
            acc, a, slot, phase, step > 0, step + 1 < steps, x_ring, word_ring, scale_ring, full, empty, kind, dtype,
            GROUP, TILES, STAGES, WGMMA, OVERLAP, WORD_LAYOUT, SCALE_LAYOUT,
        )  # fmt: skip
        at += 1
        if (at == units) | (step == steps - 1):
            if OVERLAP and TILES == 2:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            if (begun == 0) & (at == units):
                block_n, block_m = place(tile, tiles_n, tiles_m)
                write_tile(
                    acc, multiplier, bias, out, block_n * ROWS, block_m * BLOCK_M, m, n, GAIN, HAS_BIAS, out_layout
                )  # fmt: skip
            else:  # its part, to be summed later
                row = gl.arange(0, ROWS, gl.SliceLayout(1, acc_layout))
                token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, acc_layout))
                slab = (2 * pid + gl.where(own < 0, 1, 0)).to(gl.int64)
                gl.store(parts + slab * (ROWS * BLOCK_M) + row[:, None] * BLOCK_M + token[None, :], acc)
            acc = gl.zeros((ROWS, BLOCK_M), gl.float32, acc_layout)
            own -= 1
            # the next whole tile; or the first of the rest, in its middle; or the one after it
            tile = gl.where(own > 0, tile + programs, gl.where(own == 0, whole + first // units, tile + 1))
            at = gl.where(own == 0, first % units, 0)
            begun = at


_SIZES = ["m", "tiles_n", "tiles_m", "units", "whole", "rest", "sharers", "programs"]


@gluon.jit(do_not_specialize=_SIZES)
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
    tiles_n,
    tiles_m,
    units,
    whole,
    rest,
    sharers,
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
    OUT_LAYOUT: gl.constexpr,
):
    WORDS: gl.constexpr = 32 // GROUP
    dtype: gl.constexpr = x_desc.dtype
    x_ring, word_ring, scale_ring, full, empty = open_rings(
        x_desc, words_desc, scales_desc, ROWS // 64, BLOCK_M, TILES, STAGES, WORDS
    )
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    x_ring, word_ring, scale_ring, full, empty, multiplier, bias, out, parts, m, n, tiles_n, tiles_m,
                    units, whole, rest, sharers, programs, kind, dtype, GROUP, GAIN, HAS_BIAS, ROWS, BLOCK_M, TILES,
                    STAGES, WARPS, WGMMA, OVERLAP, WORD_LAYOUT, SCALE_LAYOUT, OUT_LAYOUT,
                ),
            ),
            (
                _produce,
                (
                    x_desc, words_desc, scales_desc, x_ring, word_ring, scale_ring, full, empty, tiles_n, tiles_m,
                    units, whole, rest, sharers, programs, ROWS, BLOCK_M, TILES, STAGES, WORDS,
                ),
            ),
        ],
        [1],
        [_PRODUCER_REGISTERS],
    )  # fmt: skip


@triton.jit(do_not_specialize=["m", "tiles_n", "tiles_m", "units", "whole", "rest", "sharers"])
def _sum_kernel(
    parts,
    multiplier,
    bias,
    out,
    m,
    n,
    tiles_n,
    tiles_m,
    units,
    whole,
    rest,
    sharers,
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
    total = rest * units
    low = ((begin + 1) * sharers - 1) // total  # the programs that met the first and the last unit of the tile
    high = ((begin + units) * sharers - 1) // total
    if low < high:
        row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        token = tl.arange(0, BLOCK_M)
        at = row[:, None] * BLOCK_M + token[None, :]
        acc = tl.zeros((BLOCK, BLOCK_M), tl.float32)
        for some in range(low, high + 1, 4):
            for i in tl.static_range(4):  # four loads at a time are under way
                program = some + i
                slab = 2 * program + (program * total // sharers < begin)
                acc += tl.load(parts + slab * (ROWS * BLOCK_M) + at, mask=program <= high, other=0.0)
        block_n, block_m = place(whole + tile, tiles_n, tiles_m)
        rows_n = block_n * ROWS + row
        rows_m = block_m * BLOCK_M + token
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
def stream_constants(launch: Stream, group: int, aligned: bool) -> dict[str, Any]:
    """The compile-time parameters of a launch that follow from it; kept, for they take 30 us to make."""
    lanes = min(launch.rows // 8, 32)
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
        # sixteen bytes a lane, where the rows of the output are on that grid
        "OUT_LAYOUT": gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, launch.num_warps], [0, 1])
        if aligned
        else None,
    }


def stream(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Stream) -> None:
    """``x @ weight.T + bias`` into ``out``, for x ``[m, k]``: rows aligned to 16 bytes, columns adjacent."""
    m, n = out.shape
    row_tiles, k_tiles = packed.words.shape[:2]
    lines = 32 // packed.group
    tiles_n, tiles_m = triton.cdiv(n, launch.rows), triton.cdiv(m, launch.block_m)
    units = triton.cdiv(k_tiles, launch.tiles)
    rest, sharers, programs = division(launch, tiles_n * tiles_m, units)
    sizes = (tiles_n, tiles_m, units, tiles_n * tiles_m - rest, rest, sharers)
    slabs = (2 * sharers, launch.rows, launch.block_m)
    parts = torch.empty(slabs, dtype=torch.float32, device=x.device) if rest else out
    words = packed.words.view(row_tiles, k_tiles * 16, 32)
    scales = packed.scales.view(torch.int32).view(row_tiles, k_tiles * lines, 32)
    factors = (packed.multiplier, packed.multiplier if bias is None else bias)
    constants = {"GAIN": UNPACK_GAIN[packed.kind], "HAS_BIAS": bias is not None}
    _stream_kernel[(programs,)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [launch.block_m, 64], X_SHARED),
        TensorDescriptor.from_tensor(words, [launch.rows // 64, 16 * launch.tiles, 32], WORD_SHARED),
        TensorDescriptor.from_tensor(scales, [launch.rows // 64, lines * launch.tiles, 32], SCALE_SHARED),
        *factors,
        out,
        parts,
        m,
        n,
        *sizes,
        programs,
        kind=packed.kind,
        **constants,
        **stream_constants(launch, packed.group, n % 8 == 0),
        num_warps=launch.num_warps,
        maxnreg=_HALF_REGISTERS if launch.num_warps == 4 else None,
        launch_pdl=True,
    )
    if rest:
        block = min(launch.rows, max(16, _SUMS // launch.block_m))
        _sum_kernel[(rest, launch.rows // block)](
            parts,
            *factors,
            out,
            m,
            n,
            *sizes,
            **constants,
            ROWS=launch.rows,
            BLOCK_M=launch.block_m,
            BLOCK=block,
            num_warps=max(4, block * launch.block_m // 256),
            launch_pdl=True,
        )
