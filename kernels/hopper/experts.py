"""One product of a mixture of experts on Hopper, in Gluon: the loop of rings.py over tiles of tokens by expert.

Programs take blocks of rows of the tiles (decode/route.py) in turn, all columns of each; one warp copies, the others
decode and multiply. Tokens come sorted by expert, so that a tile is one box for the copy engine: what it reads past the
end of its expert's tokens is multiplied, and not stored.
"""

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.decode import activate as in_triton
from marlin_w4a16.kernels.decode.tiles import Tiles
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
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.record import submit

activate = gluon.jit(in_triton.activate.fn)


@dataclass(frozen=True)
class Epilogue:
    """What the end of a block of rows is compiled for; as `Loop`, known by its fields.

    Attributes:
        bias: whether there is one.
        weighted: where routing weights are applied: ``"input"`` (before the bias), ``"output"``, or None.
        tail: whether rows of no expert follow, which become zeros.
        to_pairs: whether rows of the output are pairs, not places.
        activation: what follows the product, or None.
        out: the layout in which the block is stored, or None: that of the sums.
    """

    bias: bool
    weighted: str | None
    tail: bool
    to_pairs: bool
    activation: Activation | None
    out: gl.BlockedLayout | None


@gluon.jit
def _produce(
    boxes, rings, tile_experts, tile_starts, items, experts, row_blocks, row_tiles, k_blocks, loop: gl.constexpr
):  # fmt: skip
    """Copies what each k-block needs into the rings, as slots become free."""
    R: gl.constexpr = loop.rows // 64
    slot = 0
    phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        tile = item // row_blocks
        expert = gl.minimum(gl.load(tile_experts + tile), experts - 1)  # rows of no expert are zeros in the end
        start = gl.load(tile_starts + tile)
        row = expert * row_tiles + item % row_blocks * R
        for at in range(k_blocks):
            bar = rings.full.index(slot)
            mbarrier.wait(rings.empty.index(slot), phase)
            copy_weight(boxes, rings, bar, slot, row, at * loop.tiles, loop)
            copy_tokens(boxes, rings, bar, slot, start, at * loop.tiles, loop)
            slot, phase = next_slot(slot, phase, loop)


@gluon.jit
def _write(
    acc, multiplier, bias, weights, order, out, expert, experts, first_n, start, stop, n, width, GAIN: gl.constexpr,
    epilogue: gl.constexpr,
):  # fmt: skip
    """The epilogue: multiplier, routing weight, bias and activation in float32, one rounding."""
    activation: gl.constexpr = epilogue.activation
    layout: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = acc.shape[0]
    BLOCK_M: gl.constexpr = acc.shape[1]
    rows = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    of_expert = gl.minimum(expert, experts - 1).to(gl.int64) * n
    y = acc * (gl.load(multiplier + of_expert + rows, mask=rows < n, other=0.0) * GAIN)[:, None]
    if epilogue.weighted is not None:
        place = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout))
        pair = gl.load(order + place, mask=place < stop, other=0)
        weight = gl.load(weights + pair).to(gl.float32)[None, :]
    if epilogue.weighted == "input":
        y *= weight
    if epilogue.bias:
        y += gl.load(bias + of_expert + rows, mask=rows < n, other=0.0).to(gl.float32)[:, None]
    if epilogue.weighted == "output":
        y *= weight
    y = activate(y, activation)
    if epilogue.tail:
        y = gl.where(expert < experts, y, 0.0)
    out_layout: gl.constexpr = y.type.layout if epilogue.out is None else epilogue.out
    if epilogue.out is not None:
        width = width // 8 * 8  # which it is; the compiler then knows
    y = gl.convert_layout(y.to(out.dtype.element_ty), out_layout)
    columns = first_n // ROWS * y.shape[0] + gl.arange(0, y.shape[0], gl.SliceLayout(1, out_layout))
    to = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, out_layout))
    inside = to < stop
    if epilogue.to_pairs:
        to = gl.load(order + to, mask=inside, other=0)
    gl.store(
        out + to.to(gl.int64)[None, :] * width + columns[:, None], y, mask=inside[None, :] & (columns < width)[:, None]
    )


@gluon.jit
def _consume(
    rings, multiplier, bias, weights, tile_experts, tile_starts, tile_stops, order, out, items, n, width, experts,
    row_blocks, k_blocks, loop: gl.constexpr, epilogue: gl.constexpr,
):  # fmt: skip
    """Multiplies k-block after k-block, and writes a block of rows when its columns end."""
    ROWS: gl.constexpr = loop.rows
    BLOCK_M: gl.constexpr = loop.block_m
    layout: gl.constexpr = loop.sums
    acc = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
    programs = gl.num_programs(0)
    item = gl.program_id(0)
    steps = (items - item + programs - 1) // programs * k_blocks
    at = 0
    slot = 0
    phase = 0
    a = acc
    if loop.overlap:
        mbarrier.wait(rings.full.index(0), 0, pred=steps > 0)
        a = decode_tile(rings, 0, 0, loop)
    for step in range(steps):
        acc, a, slot, phase = multiply_k_block(acc, a, slot, phase, step > 0, step + 1 < steps, rings, loop)
        at += 1
        if at == k_blocks:
            if loop.overlap and loop.tiles == 2:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            tile = item // row_blocks
            _write(
                acc, multiplier, bias, weights, order, out, gl.load(tile_experts + tile), experts,
                item % row_blocks * ROWS, gl.load(tile_starts + tile), gl.load(tile_stops + tile), n, width,
                loop.gain, epilogue,
            )  # fmt: skip
            acc = gl.zeros((ROWS, BLOCK_M), gl.float32, layout)
            at = 0
            item += programs


@gluon.jit(do_not_specialize=["n", "width", "experts", "row_blocks", "row_tiles", "k_blocks"])
def _stream_experts_kernel(
    x_desc, words_desc, scales_desc, multiplier, bias, weights,
    tile_experts, tile_starts, tile_stops, count, order, out,
    n, width, experts, row_blocks, row_tiles, k_blocks,
    loop: gl.constexpr, epilogue: gl.constexpr,
):  # fmt: skip
    boxes = Boxes(x_desc, words_desc, scales_desc)
    rings = open_rings(boxes, loop)
    # The tables and the tokens are those of the kernel before. The next one is not called early: where its programs are
    # resident, some of this one's may find no room until others end, and each has its share to do.
    gdc_wait()
    items = gl.load(count) * row_blocks
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    rings, multiplier, bias, weights, tile_experts, tile_starts, tile_stops, order, out, items, n,
                    width, experts, row_blocks, k_blocks, loop, epilogue,
                ),
            ),
            (
                _produce,
                (boxes, rings, tile_experts, tile_starts, items, experts, row_blocks, row_tiles, k_blocks, loop),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


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
        launch: one of `plan_hopper_experts`.
        activation: what follows the product, or None.
        weights: routing weights of the pairs, or None.
        weighted: where they are applied: ``"input"`` (before the bias) or ``"output"``.
        to_pairs: rows of ``out`` are pairs, not places.
    """
    experts, row_tiles, k_tiles = packed.words.shape[:3]
    width = out.shape[1]
    row_blocks = triton.cdiv(packed.n, launch.rows)
    rows = launch.rows // 2 if activation is not None and activation.gated else launch.rows
    epilogue = Epilogue(
        bias=bias is not None, weighted=weighted if weights is not None else None, tail=tiles.order is None,
        to_pairs=to_pairs, activation=activation,
        out=out_layout(rows, launch.num_warps, out.element_size()) if width % 8 == 0 else None,
    )  # fmt: skip
    submit(
        _stream_experts_kernel, (min(launch.programs, len(tiles.experts) * row_blocks),),
        *boxes_of(x, packed, launch), *packed.per_row(bias), packed.multiplier if weights is None else weights,
        *tiles.tables, tiles.experts if tiles.order is None else tiles.order, out,
        packed.n, width, experts, row_blocks, row_tiles, triton.cdiv(k_tiles, launch.tiles),
        loop=loop_of(launch, packed.kind, packed.group), epilogue=epilogue,
        num_warps=launch.num_warps, maxnreg=launch.registers, launch_pdl=True,
    )  # fmt: skip
