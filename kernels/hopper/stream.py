"""The FP4 linear of Hopper for more tokens, in Gluon: a producer warp and warps that multiply, over rings (rings.py).

Which program meets which columns of which tile of the output is in schedule.py. A whole tile is finished in registers;
parts are summed by a second small kernel, always in the same order: equal bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from marlin_w4a16.kernels.decode.fragments import write_tile
from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN
from marlin_w4a16.kernels.hopper.rings import (
    PRODUCER_REGISTERS,
    Boxes,
    boxes_of,
    copy_tokens,
    copy_weight,
    decode_tile,
    loop_of,
    multiply_k_block,
    next_slot,
    open_rings,
    out_layout,
)
from marlin_w4a16.kernels.hopper.schedule import Work, k_block, place, share
from marlin_w4a16.kernels.hopper_launch import division
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.record import scratch, submit

_HALF_REGISTERS = 128  # of a multiprocessor, so that the next kernel starts beside a program of four warps
_SUMS = 1024  # elements a program of the second kernel sums


@gluon.jit
def _produce(boxes, rings, work, loop: gl.constexpr):
    """Copies what each k-block needs into the rings, as slots become free."""
    R: gl.constexpr = loop.rows // 64
    pid = gl.program_id(0)
    own, first, last = share(pid, work)
    steps = own * work.k_blocks + last - first
    # the weights do not depend on the kernel before: their first copies are under way before it ends
    early = gl.minimum(loop.stages, steps)
    for step in range(early):
        block_n, _, at = k_block(step, pid, own, first, work)
        copy_weight(boxes, rings, rings.full.index(step), step, block_n * R, at * loop.tiles, loop)
    gdc_wait()
    gdc_launch_dependents()
    slot = 0
    phase = 1
    for step in range(steps):
        block_n, block_m, at = k_block(step, pid, own, first, work)
        bar = rings.full.index(slot)
        if step >= early:
            mbarrier.wait(rings.empty.index(slot), phase)
            copy_weight(boxes, rings, bar, slot, block_n * R, at * loop.tiles, loop)
        copy_tokens(boxes, rings, bar, slot, block_m * loop.block_m, at * loop.tiles, loop)
        slot, phase = next_slot(slot, phase, loop)


@gluon.jit
def _consume(
    rings, multiplier, bias, out, parts, m, n, work, loop: gl.constexpr, HAS_BIAS: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Multiplies k-block after k-block, and writes a tile of the output when its columns or the share end."""
    ROWS: gl.constexpr = loop.rows
    BLOCK_M: gl.constexpr = loop.block_m
    layout: gl.constexpr = loop.sums
    out_layout: gl.constexpr = layout if OUT_LAYOUT is None else OUT_LAYOUT
    if OUT_LAYOUT is not None:
        n = n // 8 * 8  # which it is; the compiler then knows
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
    pid = gl.program_id(0)
    own, first, last = share(pid, work)
    steps = own * work.k_blocks + last - first
    tile = gl.where(own > 0, pid, work.whole + first // work.k_blocks)
    at = gl.where(own > 0, 0, first % work.k_blocks)
    begun = at
    slot = 0
    phase = 0
    a = acc
    if loop.overlap:
        mbarrier.wait(rings.full.index(0), 0)
        a = decode_tile(rings, 0, 0, loop)
    for step in range(steps):
        acc, a, slot, phase = multiply_k_block(acc, a, slot, phase, step > 0, step + 1 < steps, rings, loop)
        at += 1
        if (at == work.k_blocks) | (step == steps - 1):
            if loop.overlap and loop.tiles == 2:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            if (begun == 0) & (at == work.k_blocks):
                block_n, block_m = place(tile, work.tiles_n, work.tiles_m)
                write_tile(
                    acc, multiplier, bias, out, block_n * ROWS, block_m * BLOCK_M, m, n, loop.gain, HAS_BIAS, out_layout
                )  # fmt: skip
            else:  # its part, to be summed later
                row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
                token = gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
                slab = (2 * pid + gl.where(own < 0, 1, 0)).to(gl.int64)
                gl.store(parts + slab * (ROWS * BLOCK_M) + row[:, None] * BLOCK_M + token[None, :], acc)
            acc = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
            own -= 1
            # the next whole tile; or the first of the rest, in its middle; or the one after it
            tile = gl.where(
                own > 0, tile + work.programs, gl.where(own == 0, work.whole + first // work.k_blocks, tile + 1)
            )
            at = gl.where(own == 0, first % work.k_blocks, 0)
            begun = at


@gluon.jit(do_not_specialize=["m", "tiles_n", "tiles_m", "k_blocks", "whole", "rest", "sharers", "programs"])
def _stream_kernel(
    x_desc, words_desc, scales_desc, multiplier, bias, out, parts,
    m, n, tiles_n, tiles_m, k_blocks, whole, rest, sharers, programs,
    loop: gl.constexpr, HAS_BIAS: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    boxes = Boxes(x_desc, words_desc, scales_desc)
    work = Work(tiles_n, tiles_m, k_blocks, whole, rest, sharers, programs)
    rings = open_rings(boxes, loop)
    gl.warp_specialize(
        [
            (_consume, (rings, multiplier, bias, out, parts, m, n, work, loop, HAS_BIAS, OUT_LAYOUT)),
            (_produce, (boxes, rings, work, loop)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )


@triton.jit(do_not_specialize=["m", "tiles_n", "tiles_m", "k_blocks", "whole", "rest", "sharers"])
def _sum_kernel(
    parts, multiplier, bias, out,
    m, n, tiles_n, tiles_m, k_blocks, whole, rest, sharers,
    GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    gdc_wait()
    gdc_launch_dependents()
    tile = tl.program_id(0)
    begin = tile.to(tl.int64) * k_blocks
    total = rest * k_blocks
    low = ((begin + 1) * sharers - 1) // total  # the programs that met the first and the last k-block of the tile
    high = ((begin + k_blocks) * sharers - 1) // total
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


def stream(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Stream) -> None:
    """``x @ weight.T + bias`` into ``out``, for x ``[m, k]``: rows aligned to 16 bytes, columns adjacent."""
    m, n = out.shape
    tiles_n, tiles_m = triton.cdiv(n, launch.rows), triton.cdiv(m, launch.block_m)
    k_blocks = triton.cdiv(packed.words.shape[1], launch.tiles)
    rest, sharers, programs = division(launch, tiles_n * tiles_m, k_blocks)
    work = Work(tiles_n, tiles_m, k_blocks, tiles_n * tiles_m - rest, rest, sharers, programs)
    per_row = packed.per_row(bias)
    slabs = (2 * sharers, launch.rows, launch.block_m)
    parts = scratch(slabs, torch.float32, x.device) if rest else out
    submit(
        _stream_kernel, (programs,),
        *boxes_of(x, packed, launch), *per_row, out, parts,
        m, n, *work,
        loop=loop_of(launch, packed.kind, packed.group), HAS_BIAS=bias is not None,
        OUT_LAYOUT=out_layout(launch.rows, launch.num_warps, out.element_size()) if n % 8 == 0 else None,
        num_warps=launch.num_warps, maxnreg=_HALF_REGISTERS if launch.num_warps == 4 else None, launch_pdl=True,
    )  # fmt: skip
    if rest:
        block = min(launch.rows, max(16, _SUMS // launch.block_m))
        submit(
            _sum_kernel, (rest, launch.rows // block),
            parts, *per_row, out,
            m, n, *work[:-1],
            GAIN=UNPACK_GAIN[packed.kind], HAS_BIAS=bias is not None,
            ROWS=launch.rows, BLOCK_M=launch.block_m, BLOCK=block,
            num_warps=max(4, block * launch.block_m // 256), launch_pdl=True,
        )  # fmt: skip
