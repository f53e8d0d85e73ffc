"""What the Hopper kernels for more tokens share, in Gluon: one warp feeds rings, the others decode and multiply.

A slot of the rings holds a k-block of a tile of the output: ``64 * tiles`` columns of its tokens, codes and scales. The
decoded weight is the register operand of wgmma.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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

from marlin_w4a16.kernels.decode.fragments import copy_to_shared, scale_pairs, unpack_words
from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.layout import PackedFP4

PRODUCER_REGISTERS = gl.constexpr(24)
_X_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_WORD_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=3)
_SCALE_SHARED = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)


@dataclass(frozen=True)
class Loop:
    """What the loop is compiled for. Triton's caches tell one from another by its fields: it has nothing else.

    Attributes:
        kind, group: of the weight.
        gain: what the kernel's epilogue multiplies by (unpack.py).
        rows, block_m, tiles, stages, warps, wgmma, overlap: of the launch, see `Stream`.
        sums: the layout of the sums ``[rows, block_m]``.
        words, scales: the layouts of a column tile in registers.
    """

    kind: str
    group: int
    gain: float
    rows: int
    block_m: int
    tiles: int
    stages: int
    warps: int
    wgmma: bool
    overlap: bool
    sums: gl.NVMMADistributedLayout
    words: gl.DistributedLinearLayout
    scales: gl.DistributedLinearLayout


class Boxes(NamedTuple):
    """Descriptors for the copy engine: a column tile of tokens, and k-blocks of codes and scales."""

    x: Any
    words: Any
    scales: Any


class Rings(NamedTuple):
    """Shared memory for k-blocks of tokens, codes and scales, and the barriers of its slots: full, and empty again."""

    x: Any
    words: Any
    scales: Any
    full: Any
    empty: Any


@gluon.jit
def open_rings(boxes, loop: gl.constexpr):
    """Empty rings."""
    R: gl.constexpr = loop.rows // 64
    STAGES: gl.constexpr = loop.stages
    LINES: gl.constexpr = 32 // loop.group * loop.tiles
    x = gl.allocate_shared_memory(boxes.x.dtype, [STAGES * loop.tiles, loop.block_m, 64], boxes.x.layout)
    words = gl.allocate_shared_memory(gl.int32, [STAGES, R, 16 * loop.tiles, 32], boxes.words.layout)
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, R, LINES, 32], boxes.scales.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    return Rings(x, words, scales, full, empty)


@gluon.jit
def copy_weight(boxes, rings, bar, slot, row, column, loop: gl.constexpr):
    """Starts the copies of codes and scales of a k-block, and expects at ``bar`` the bytes of all that fills its slot.

    ``row`` and ``column`` count tiles of the weight.
    """
    WORDS: gl.constexpr = 32 // loop.group
    BYTES: gl.constexpr = loop.tiles * (loop.rows // 64 * (2048 + WORDS * 128) + loop.block_m * 128)
    mbarrier.expect(bar, BYTES)
    copy_to_shared(boxes.words, [row, column * 16, 0], bar, rings.words.index(slot))
    copy_to_shared(boxes.scales, [row, column * WORDS, 0], bar, rings.scales.index(slot))


@gluon.jit
def copy_tokens(boxes, rings, bar, slot, token, column, loop: gl.constexpr):
    """Starts the copies of a k-block of the tokens from ``token`` on."""
    TILES: gl.constexpr = loop.tiles
    for j in gl.static_range(TILES):
        copy_to_shared(boxes.x, [token, (column + j) * 64], bar, rings.x.index(slot * TILES + j))


@gluon.jit
def next_slot(slot, phase, loop: gl.constexpr):
    """The slot after a slot, and the phase of its barriers."""
    slot += 1
    if slot == loop.stages:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def decode_tile(rings, slot, j, loop: gl.constexpr):
    """The operand ``[rows, 64]`` of column tile j of a slot: codes times block scales."""
    R: gl.constexpr = loop.rows // 64
    WORDS: gl.constexpr = 32 // loop.group
    kind: gl.constexpr = loop.kind
    dtype: gl.constexpr = rings.x.dtype
    q = rings.words.index(slot).slice(j * 16, 16, dim=1).load(loop.words)
    s = rings.scales.index(slot).slice(j * WORDS, WORDS, dim=1).load(loop.scales)
    q = q.reshape((R, 32, 4, 4))
    # the scale words [R, 4 w, 8 g, WORDS] serve the four lanes t of a row
    p = scale_pairs(s.reshape((R, 32, WORDS)), kind, dtype, loop.group).reshape((R, 32, 4))
    p = gl.convert_layout(p, gl.SliceLayout(2, q.type.layout), assert_trivial=True)
    q, p = gl.broadcast(q, p[:, :, None, :])
    a = unpack_words(q, p, kind, dtype).reshape((R, 4, 8, 4, 4, 2, 2, 2))
    # R w g t s p r h -> (R w r g) (s h t p)
    a = a.permute((0, 1, 6, 2, 4, 7, 3, 5)).reshape((R * 64, 64))
    return gl.convert_layout(a, gl.DotOperandLayout(0, loop.sums, 2), assert_trivial=True)


@gluon.jit
def multiply_k_block(acc, a, slot, phase, follows, goes_on, rings, loop: gl.constexpr):
    """Adds the products of a slot to ``acc``; and the operand of the next k-block, its slot and its phase.

    Where products overlap, ``a`` is the operand of the first column tile of this k-block, and with two tiles the last
    product is still under way. ``follows`` and ``goes_on`` say whether there were and will be other k-blocks.
    """
    TILES: gl.constexpr = loop.tiles
    before = gl.where(slot == 0, loop.stages - 1, slot - 1)
    after, after_phase = next_slot(slot, phase, loop)
    if not loop.overlap:
        mbarrier.wait(rings.full.index(slot), phase)
    for j in gl.static_range(TILES):
        b = rings.x.index(slot * TILES + j).permute((1, 0))
        if loop.overlap:
            # One product is under way while the next operand is decoded. That is loaded after the wait, so that
            # nothing writes registers which the product before still reads (see below).
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if j == 0:
                mbarrier.arrive(rings.empty.index(before), count=1, pred=follows)
            if j < TILES - 1:
                a = decode_tile(rings, slot, j + 1, loop)
            else:
                mbarrier.wait(rings.full.index(after), after_phase, pred=goes_on)
                a = decode_tile(rings, after, 0, loop)
        else:
            operand = decode_tile(rings, slot, j, loop)
            if loop.wgmma:
                acc = warpgroup_mma(operand, b, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
            else:
                acc = mma_v2(operand, b.load(gl.DotOperandLayout(1, loop.sums, 2)), acc)
    if not loop.overlap:
        mbarrier.arrive(rings.empty.index(slot), count=1)
    elif TILES > 2:
        # ptxas does not know, from one turn of a loop to the next, what a product still reads. Two operands take
        # turns in two sets of registers; of more, the first may be given those of the last.
        acc = warpgroup_mma_wait(0, deps=(acc,))
    return acc, a, after, after_phase


def boxes_of(x: Tensor, packed: PackedFP4, launch: Stream) -> Boxes:
    """x, and the tiles of a weight or of a stack of them, as the copy engine takes them."""
    *lead, k_tiles, _ = packed.words.shape
    rows = torch.Size(lead).numel()
    lines = 32 // packed.group
    words = packed.words.view(rows, k_tiles * 16, 32)
    scales = packed.scales.view(torch.int32).view(rows, k_tiles * lines, 32)
    return Boxes(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [launch.block_m, 64], _X_SHARED),
        TensorDescriptor.from_tensor(words, [launch.rows // 64, 16 * launch.tiles, 32], _WORD_SHARED),
        TensorDescriptor.from_tensor(scales, [launch.rows // 64, lines * launch.tiles, 32], _SCALE_SHARED),
    )


@functools.cache
def loop_of(launch: Stream, kind: str, group: int) -> Loop:
    """The loop of a launch; kept, for its layouts take 30 us to make."""
    version, shape = ([3, 0], [16, launch.block_m, 16]) if launch.wgmma else ([2, 0], [16, 8])
    return Loop(
        kind, group, UNPACK_GAIN[kind],
        launch.rows, launch.block_m, launch.tiles, launch.stages, launch.num_warps, launch.wgmma, launch.overlap,
        gl.NVMMADistributedLayout(version, [launch.num_warps, 1], shape),
        _lines(launch.rows, launch.num_warps, 4), _lines(launch.rows, launch.num_warps, 32 // group),
    )  # fmt: skip


@functools.cache
def out_layout(rows: int, warps: int, nbytes: int) -> gl.BlockedLayout:
    """Sixteen bytes a lane along the rows of a finished tile, where the rows of the output are on that grid."""
    each = 16 // nbytes
    lanes = min(rows // each, 32)
    return gl.BlockedLayout([each, 1], [lanes, 32 // lanes], [1, warps], [0, 1])


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
