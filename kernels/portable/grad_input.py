"""The portable kernels of the gradient of a linear's input: ``grad @ weight``, fp32 to the end.

The multiplier of a row stands on the axis that is summed over, so it cannot follow the sums. It is taken apart: the
largest absolute multiplier is applied to the sums, in float32, and what a row's is of that, at most one, to grad, whose
products are rounded to 16 bits. Where all rows have one multiplier, that factor is one and grad stays as it is.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN, hide_joins, lane_offsets, load_rows
from marlin_w4a16.kernels.grad_launch import GradLaunch
from marlin_w4a16.kernels.layout import TILE, PackedFP4
from marlin_w4a16.kernels.portable.dense import write_out
from marlin_w4a16.kernels.portable.linear import wait_for_products
from marlin_w4a16.kernels.record import multiply, scratch, submit

_SCALE_BLOCK = 1024
_EPILOGUE_BLOCK = 1024
_STEP = 2 * TILE  # the most weight rows of a step: scaled gradients have columns for whole ones
_SCALE_PROGRAMS = 1024  # beyond, programs take tokens in turn: each looks through all multipliers
# Bytes of the scratch tensors when a weight is written out for cuBLAS: of the weight, and of float32 products.
_WEIGHT_BYTES = 256 << 20
_PARTS_BYTES = 64 << 20


@triton.jit
def _power_for_half(top):
    """The power of two that brings the float32 ``top`` to 2**14 up to 2**15, and its inverse; 1 where it cannot."""
    exponent = (top.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = tl.where((exponent == 0) | (exponent == 0xFF), 127, tl.minimum(268 - exponent, 253))
    return (power << 23).to(tl.float32, bitcast=True), ((254 - power) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _load_scaled(row, multiplier, size, at, n, stride):
    """Gradients of a token at ``at`` times what the multipliers are of ``size``; zeros from ``n`` on."""
    ratio = tl.div_rn(tl.load(multiplier + at, mask=at < n, other=0.0), size)  # exactly one where they are equal
    return tl.load(row + at.to(tl.int64) * stride, mask=at < n, other=0.0).to(tl.float32) * ratio


@triton.jit(do_not_specialize=["m"])
def _scale_kernel(
    grad, multiplier, scaled, factors,
    m, n, width, stride_m, stride_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes ``scaled[m, n] * factors[m] = grad[m, n] * multiplier[n]``; zeros from column ``n`` up to ``width``."""
    HALF: tl.constexpr = scaled.dtype.element_ty == tl.float16
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        at = start + column
        largest = tl.maximum(largest, tl.abs(tl.load(multiplier + at, mask=at < n, other=0.0)))
    size = tl.max(largest, 0)
    size = tl.where(size > 0, size, 1.0)
    for turn in range(tl.cdiv(m - tl.program_id(0), tl.num_programs(0))):
        token = (tl.program_id(0) + turn * tl.num_programs(0)).to(tl.int64)
        row = grad + token * stride_m
        power = 1.0
        inverse = 1.0
        if HALF:  # has no room for gradients that are small, times factors that are: the largest of a token fills it
            top = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, n, BLOCK):
                top = tl.maximum(top, tl.abs(_load_scaled(row, multiplier, size, start + column, n, stride_n)))
            power, inverse = _power_for_half(tl.max(top, 0))
        for start in range(0, width, BLOCK):
            at = start + column
            value = _load_scaled(row, multiplier, size, at, n, stride_n) * power
            tl.store(scaled + token * width + at, value.to(scaled.dtype.element_ty), mask=at < width)
        tl.store(factors + token, size * inverse)


@triton.jit(do_not_specialize=["m", "row_tiles", "k_tiles"])
def _grad_input_kernel(
    scaled, words, scales, factors, out,
    m, k, width, row_tiles, k_tiles,
    kind: tl.constexpr, GROUP: tl.constexpr, GAIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PTX: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = BLOCK_N // 64
    C: tl.constexpr = BLOCK_K // 64
    token_blocks = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    block_k = pid // token_blocks
    block_m = pid % token_blocks
    part = tl.program_id(1)
    part_tiles = tl.cdiv(tl.cdiv(row_tiles, R), tl.num_programs(1)) * R
    first = part * part_tiles
    last = tl.minimum(first + part_tiles, row_tiles)

    # what is past the end repeats the last: tokens and columns are not stored, rows of tiles meet zeros
    tile_column = tl.minimum(block_k * C + tl.arange(0, C), k_tiles - 1)[:, None, None]
    word_at, scale_at = lane_offsets(GROUP)

    rows_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    scaled_rows = scaled + tl.minimum(rows_m, m - 1)[:, None].to(tl.int64) * width
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in tl.range(first, last, R, num_stages=STAGES):
        for r in tl.static_range(R):
            tile = step + r
            at = (tile if R == 1 else tl.minimum(tile, row_tiles - 1)) * k_tiles + tile_column
            b = load_rows(words, scales, at, word_at, scale_at, kind, scaled.dtype.element_ty, GROUP, PTX)
            if PTX:
                b = hide_joins(b)
            a = tl.load(scaled_rows + tile * 64 + tl.arange(0, 64)[None, :])
            acc = tl.dot(a, b, acc)
        if WGMMA:
            acc = wait_for_products(acc)

    columns = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows_m < m)[:, None] & (columns < k)[None, :]
    if SPLIT:
        out_at = (part.to(tl.int64) * m + rows_m)[:, None] * k + columns[None, :]
    else:
        acc = acc * GAIN * tl.load(factors + rows_m, mask=rows_m < m, other=0.0)[:, None]
        out_at = rows_m[:, None].to(tl.int64) * k + columns[None, :]
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_part"])
def _epilogue_kernel(
    parts, factors, out,
    k, stride_part, stride_row, stride_out,
    GAIN: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < k
    at = row.to(tl.int64) * stride_row + column
    acc = tl.load(parts + at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):  # always in this order: the sum repeats bit for bit
        acc += tl.load(parts + part * stride_part + at, mask=mask, other=0.0)
    acc = acc * GAIN * tl.load(factors + row)
    tl.store(out + row.to(tl.int64) * stride_out + column, acc.to(out.dtype.element_ty), mask=mask)


def scaled_gradient(grad: Tensor, packed: PackedFP4, step: int = _STEP) -> tuple[Tensor, Tensor]:
    """Gradients ``[m, n]`` of any strides times the multipliers of the rows.

    Args:
        grad, packed: see `fused`.
        step: weight rows of a step.

    Returns:
        ``scaled``: ``[m, columns of whole steps]``, zeros from column ``n`` on: in float16, which has three bits more
            than bfloat16, where scales are E4M3, whose values it holds; else in the dtype of grad.
        ``factors``: float32 ``[m]``, by which the product of ``scaled`` with the values of the weight is multiplied.
    """
    m, n = grad.shape
    dtype = torch.float16 if packed.kind == "e4m3" else grad.dtype
    scaled = scratch((m, triton.cdiv(n, step) * step), dtype, grad.device)
    factors = scratch(m, torch.float32, grad.device)
    submit(
        _scale_kernel, (min(m, _SCALE_PROGRAMS),),
        grad, packed.multiplier, scaled, factors, m, n, scaled.shape[1], *grad.stride(), BLOCK=_SCALE_BLOCK,
    )  # fmt: skip
    return scaled, factors


def fused(grad: Tensor, packed: PackedFP4, out: Tensor, launch: GradLaunch, *, ptx: bool, wgmma: bool) -> None:
    """Launches the fused kernel into ``out`` ``[m, k]``; without ``ptx`` it runs in Triton's interpreter too."""
    m, k = out.shape
    packed = packed.contiguous()
    scaled, factors = scaled_gradient(grad, packed)
    split = launch.split_n > 1
    target = scratch((launch.split_n, m, k), torch.float32, grad.device) if split else out
    submit(
        _grad_input_kernel, (triton.cdiv(m, launch.block_m) * triton.cdiv(k, launch.block_k), launch.split_n),
        scaled, packed.words, packed.scales.view(torch.int32), factors, target,
        m, k, scaled.shape[1], *packed.words.shape[:2],
        kind=packed.kind, GROUP=packed.group, GAIN=UNPACK_GAIN[packed.kind], BLOCK_M=launch.block_m,
        BLOCK_K=launch.block_k, BLOCK_N=launch.block_n, SPLIT=split, STAGES=launch.num_stages, PTX=ptx, WGMMA=wgmma,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if split:
        _epilogue(target, packed, factors, out)


def through_dense(grad: Tensor, packed: PackedFP4, out: Tensor, *, ptx: bool = True) -> None:
    """Writes ``code * scale`` out exactly, a block of columns at a time, and lets cuBLAS multiply into float32."""
    m, k = out.shape
    packed = packed.contiguous()
    scaled, factors = scaled_gradient(grad, packed, TILE)
    row_tiles, k_tiles = packed.words.shape[:2]
    rows, step = row_tiles * TILE, max(1, _WEIGHT_BYTES // (row_tiles * TILE * grad.element_size()) // TILE)
    weight = scratch((rows, min(step, k_tiles) * TILE), scaled.dtype, grad.device)
    tokens = min(m, max(1, _PARTS_BYTES // (weight.shape[1] * 4)))
    part = scratch((tokens, weight.shape[1]), torch.float32, grad.device)
    for first in range(0, k_tiles, step):
        tiles = slice(first, min(first + step, k_tiles))
        write_out(packed.words, packed.scales, weight, packed.kind, tiles, ptx=ptx)
        columns = slice(tiles.start * TILE, min(tiles.stop * TILE, k))
        dense = _part(weight, slice(0, rows), slice(0, (tiles.stop - tiles.start) * TILE))
        for start in range(0, m, tokens):
            some = slice(start, min(start + tokens, m))
            shape = some.stop - start, dense.shape[1]
            product = part if part.shape == shape else part.view(-1)[: math.prod(shape)].view(shape)
            multiply(_part(scaled, some, slice(0, rows)), dense, product)
            _epilogue(product.unsqueeze(0), packed, factors[some], _part(out, some, columns))


def _part(matrix: Tensor, rows: slice, columns: slice) -> Tensor:
    """Some rows and columns; the matrix itself where these are all, which a view takes the host 4 us to say."""
    whole = (rows.stop - rows.start, columns.stop - columns.start) == matrix.shape
    return matrix if whole else matrix[rows, columns]


def _epilogue(parts: Tensor, packed: PackedFP4, factors: Tensor, out: Tensor) -> None:
    """Sums float32 parts ``[p, m, k and more]`` into ``out`` ``[m, k]``; rows are contiguous."""
    m, k = out.shape
    block = min(_EPILOGUE_BLOCK, triton.next_power_of_2(k))
    submit(
        _epilogue_kernel, (m, triton.cdiv(k, block)),
        parts, factors, out, k, parts.stride(0), parts.stride(1), out.stride(0),
        GAIN=UNPACK_GAIN[packed.kind], PARTS=parts.shape[0], BLOCK=block,
    )  # fmt: skip
