"""The FP4 linear of Hopper for few tokens, in Gluon: a program takes blocks of rows with all of their columns.

The warps of a program share out the columns. Each streams its tiles from HBM straight into the register operand of
``mma.sync``, one step ahead, and the sums of the warps meet once a block, in a fixed order. x stays in shared memory
where it fits, and passes through a ring where it does not. Nothing is split over programs: no scratch, no second
kernel, and equal bits on every run.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from marlin_w4a16.kernels.decode.fragments import copy_to_shared, scale_pairs, unpack_words, write_tile
from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN
from marlin_w4a16.kernels.launch import Rows
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.record import submit

_X_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
_REGISTERS = 128  # a lane: 16 warps fill a multiprocessor, of one program or of two


@dataclass(frozen=True)
class Loop:
    """What a launch is compiled for. Triton's caches tell one from another by its fields: it has nothing else.

    Attributes:
        kind, group: of the weight.
        rows, block_m, warps, steps, stages, resident: of the launch, see `Rows`.
        even: whether every warp has a tile of its own in every step.
        words, scales: flat layouts of what a step loads.
        sums: the layout in which the sums of the warps meet.
        x: that of tokens in shared memory.
    """

    kind: str
    group: int
    rows: int
    block_m: int
    warps: int
    steps: int
    stages: int
    resident: bool
    even: bool
    words: gl.DistributedLinearLayout
    scales: gl.DistributedLinearLayout
    sums: gl.BlockedLayout
    x: gl.NVMMASharedLayout


class _Weight(NamedTuple):
    """The weight, and what a lane loads of a tile: which of the warps' tiles, and where in it."""

    words: Any
    scales: Any
    word_warp: Any
    word_at: Any
    scale_warp: Any
    scale_at: Any
    k_tiles: Any


@gluon.jit
def _load(weight, row, step, loop: gl.constexpr):
    """The words and scale words of one tile a warp; warps past the last column repeat it: they meet zeros of x."""
    W: gl.constexpr = loop.warps
    WORDS: gl.constexpr = 32 // loop.group
    tile_row = (row // 64).to(gl.int64) * weight.k_tiles
    word_tile = step * W + weight.word_warp
    scale_tile = step * W + weight.scale_warp
    if not loop.even:
        word_tile = gl.minimum(word_tile, weight.k_tiles - 1)
        scale_tile = gl.minimum(scale_tile, weight.k_tiles - 1)
    word_to = gl.max_contiguous(gl.multiple_of(word_tile * 512 + weight.word_at, 4), 4)
    scale_to = gl.max_contiguous(gl.multiple_of(scale_tile * (32 * WORDS) + weight.scale_at, WORDS), WORDS)
    q = gl.load(weight.words + tile_row * 512 + row % 64 * 8 + word_to)
    s = gl.load(weight.scales + tile_row * (32 * WORDS) + row % 64 // 2 * WORDS + scale_to)
    return q, s


@gluon.jit
def _decode(q, s, dtype: gl.constexpr, layout: gl.constexpr, loop: gl.constexpr):
    """The operand ``[warps, rows, 64]``: codes times block scales."""
    W: gl.constexpr = loop.warps
    ROWS: gl.constexpr = loop.rows
    kind: gl.constexpr = loop.kind
    p = scale_pairs(s, kind, dtype, loop.group).reshape((W * ROWS * 8,))
    p = gl.convert_layout(p, q.type.layout, assert_trivial=True)
    a = unpack_words(q, p, kind, dtype).reshape((W, ROWS // 16, 8, 4, 4, 2, 2, 2))
    # W n g t s p r h -> W (n r g) (s h t p)
    a = a.permute((0, 1, 6, 2, 4, 7, 3, 5)).reshape((W, ROWS, 64))
    return gl.convert_layout(a, layout, assert_trivial=True)


@gluon.jit
def _fill(x, ring, m, k, stride_xm, loop: gl.constexpr):
    """Puts all of x into the ring, zeros past its end.

    By plain loads: the copy engines of all multiprocessors, asking for the same few lines at once, take longer.
    """
    W: gl.constexpr = loop.warps
    TURNS: gl.constexpr = loop.stages * loop.steps
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 4, 8], [W, 1, 1], [2, 1, 0])
    tile = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None][:, :, None]
    row = gl.arange(0, loop.block_m, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :][:, :, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(0, layout)))[None, :][None, :, :]
    for i in gl.static_range(TURNS):
        at = (i * W + tile) * 64 + column
        value = gl.load(x + row.to(gl.int64) * stride_xm + at, mask=(row < m) & (at < k), other=0.0)
        ring.index(i).store(value)


@gluon.jit
def _fetch(x_desc, ring, full, turn, slot, pred, loop: gl.constexpr):
    """Starts the copy of the tokens that the steps of a turn meet."""
    W: gl.constexpr = loop.warps
    STEPS: gl.constexpr = loop.steps
    mbarrier.expect(full.index(slot), STEPS * W * loop.block_m * 128, pred=pred)
    for i in gl.static_range(STEPS):
        copy_to_shared(
            x_desc, [(turn * STEPS + i) * W, 0, 0], full.index(slot), ring.index(slot * STEPS + i), pred=pred
        )


@gluon.jit(do_not_specialize=["m", "blocks", "k_tiles", "turns"])
def _rows_kernel(
    x, words, scales, multiplier, bias, out,
    m, n, k, stride_xm, blocks, k_tiles, turns,
    loop: gl.constexpr, GAIN: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out.dtype.element_ty
    ROWS: gl.constexpr = loop.rows
    BLOCK_M: gl.constexpr = loop.block_m
    W: gl.constexpr = loop.warps
    STEPS: gl.constexpr = loop.steps
    STAGES: gl.constexpr = loop.stages
    WORDS: gl.constexpr = 32 // loop.group
    sum_layout: gl.constexpr = loop.sums
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, acc_layout, 2)

    # word [W, rows / 16, 8 g, 4 t, 4 s]; scale word [W, rows / 16, 8 g, 4 t, WORDS], the same for all t
    word = gl.arange(0, W * ROWS * 8, loop.words)
    word_warp = word // (ROWS * 8)
    word_at = word % (ROWS * 8)
    scale = gl.arange(0, W * ROWS * 2 * WORDS, loop.scales)
    scale_warp = scale // (ROWS * 2 * WORDS)
    scale_at = scale % (ROWS * 2 * WORDS) // (4 * WORDS) * WORDS + scale % WORDS

    # the weights do not depend on the kernel before: their first loads are under way before it ends
    first = gl.program_id(0)
    programs = gl.num_programs(0)
    weight = _Weight(words, scales, word_warp, word_at, scale_warp, scale_at, k_tiles)
    queue = _load(weight, first * ROWS, 0, loop)
    for i in gl.static_range(1, STEPS):
        queue = queue + _load(weight, first * ROWS, i, loop)

    ring = gl.allocate_shared_memory(dtype, [STAGES * STEPS, W, BLOCK_M, 64], loop.x)
    slot = 0
    phase = 0
    done = 0
    if loop.resident:
        gdc_wait()
        gdc_launch_dependents()
        _fill(x, ring, m, k, stride_xm, loop)
    else:
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
        gdc_wait()
        gdc_launch_dependents()
        total = turns * ((blocks - first + programs - 1) // programs)
        for i in gl.static_range(STAGES - 1):
            _fetch(x, ring, full, i % turns, i, i < total, loop)

    for block in range(first, blocks, programs):
        acc = gl.zeros((W, ROWS, BLOCK_M), gl.float32, acc_layout)
        after = gl.minimum(block + programs, blocks - 1)
        if loop.resident:
            # unrolled: the columns are constants of the addresses, and the steps overlap
            for i in gl.static_range(STEPS * STAGES):
                a = _decode(queue[0], queue[1], dtype, a_layout, loop)
                row = (block if i + STEPS < STEPS * STAGES else after) * ROWS
                queue = queue[2:] + _load(weight, row, (i + STEPS) % (STEPS * STAGES), loop)
                acc = mma_v2(a, ring.index(i).permute((0, 2, 1)).load(b_layout), acc)
        else:
            for turn in range(turns):
                mbarrier.wait(full.index(slot), phase)
                free = gl.where(slot == 0, STAGES - 1, slot - 1)
                _fetch(x, ring, full, (turn + STAGES - 1) % turns, free, done + STAGES - 1 < total, loop)
                done += 1
                ends = turn == turns - 1
                row = gl.where(ends, after, block) * ROWS
                step = gl.where(ends, 0, (turn + 1) * STEPS)
                for i in gl.static_range(STEPS):
                    a = _decode(queue[0], queue[1], dtype, a_layout, loop)
                    queue = queue[2:] + _load(weight, row, step + i, loop)
                    acc = mma_v2(a, ring.index(slot * STEPS + i).permute((0, 2, 1)).load(b_layout), acc)
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase ^= 1
        y = gl.sum(gl.convert_layout(acc, sum_layout), 0)
        write_tile(y, multiplier, bias, out, block * ROWS, 0, m, n, GAIN, HAS_BIAS, gl.SliceLayout(0, sum_layout))


def _flat(warps: int, registers: tuple[int, ...], lane: int, width: int) -> gl.DistributedLinearLayout:
    """A flat layout of ``width`` elements a warp: what each register bit and the first lane bit are worth."""
    bits = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[r] for r in registers],
        lane_bases=[[lane << b] for b in range(5)],
        warp_bases=[[width << b] for b in range(bits)],
        block_bases=[],
        shape=[warps * width],
    )


@functools.cache
def _loop_of(launch: Rows, kind: str, group: int, even: bool) -> Loop:
    """The loop of a launch; kept, for its layouts take 30 us to make."""
    rows, block_m, warps, words = launch.rows, launch.block_m, launch.num_warps, 32 // group
    sixteens = range((rows // 16).bit_length() - 1)
    return Loop(
        kind, group, rows, block_m, warps, launch.steps, launch.stages, launch.resident, even,
        _flat(warps, (1, 2, *(128 << b for b in sixteens)), 4, rows * 8),
        _flat(warps, (*[1] * (words - 1), *(32 * words << b for b in sixteens)), words, rows * 2 * words),
        gl.BlockedLayout([warps, 1, 1], [1, 32 // block_m, block_m], [1, warps, 1], [2, 1, 0]),
        _X_SHARED,
    )  # fmt: skip


def by_rows(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Rows) -> None:
    """``x @ weight.T + bias`` into ``out``, for x ``[m, k]`` of at most ``block_m`` rows, columns adjacent."""
    m, n = out.shape
    k_tiles, width = packed.words.shape[1], launch.num_warps * launch.steps
    submit(
        _rows_kernel, (launch.programs,),
        x if launch.resident else _tiles(x, launch), packed.words, packed.scales.view(torch.int32),
        *packed.per_row(bias), out,
        m, n, packed.k, x.stride(0), triton.cdiv(n, launch.rows), k_tiles, triton.cdiv(k_tiles, width),
        loop=_loop_of(launch, packed.kind, packed.group, k_tiles % width == 0),
        GAIN=UNPACK_GAIN[packed.kind], HAS_BIAS=bias is not None,
        num_warps=launch.num_warps, maxnreg=_REGISTERS, launch_pdl=True,
    )  # fmt: skip


def _tiles(x: Tensor, launch: Rows) -> TensorDescriptor:
    """x in tiles of 64 columns for the copy engine, ``[k / 64, m, 64]``; what lies outside comes as zeros."""
    if x.shape[1] % 64:
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 64))
    shape, strides = [x.shape[1] // 64, x.shape[0], 64], [64, x.stride(0), 1]
    return TensorDescriptor(x, shape, strides, [launch.num_warps, launch.block_m, 64], _X_SHARED)
