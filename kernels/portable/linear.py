"""The portable kernel of FP4 linears: decode in registers, multiply on the tensor cores, fp32 to the end.

Computes ``out^T = weight @ x^T``, so that the decoded weight is the left operand, which Triton keeps in registers
(wgmma and mma.sync alike), and the small x comes from shared memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN, lane_offsets, load_operand
from marlin_w4a16.kernels.launch import Launch, plan_linear
from marlin_w4a16.kernels.layout import TILE, PackedFP4
from marlin_w4a16.kernels.portable.dense import write_out
from marlin_w4a16.kernels.record import scratch, submit
from marlin_w4a16.kernels.target import Target

_EPILOGUE_BLOCK = 1024
# Bytes of the scratch tensors when a weight is written out for cuBLAS: of the weight, and of float32 products.
_WEIGHT_BYTES = 32 << 20
_PARTS_BYTES = 32 << 20


@triton.jit
def wait_for_products(acc):
    """Sums of wgmma, after which nothing of it is in flight.

    It reads its register operand after it was issued. Triton leaves some in flight across the iterations of a loop,
    while the next one already decodes into the same registers; any use of the sums makes it wait (seen with Triton 3.6
    on an H200: wrong results with 128 tokens a block).
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["m", "row_tiles", "k_tiles"])
def _linear_kernel(
    x, words, scales, multiplier, bias, out,
    m, n, k, row_tiles, k_tiles, stride_xm, stride_xk,
    kind: tl.constexpr, GROUP: tl.constexpr, GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, launch: tl.constexpr,
    PTX: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    BLOCK_N: tl.constexpr = launch.block_n
    BLOCK_M: tl.constexpr = launch.block_m
    R: tl.constexpr = BLOCK_N // 64
    C: tl.constexpr = launch.block_k // 64
    token_blocks = tl.cdiv(m, BLOCK_M)
    pid = tl.program_id(0)
    block_n = pid // token_blocks
    block_m = pid % token_blocks
    part = tl.program_id(1)
    part_tiles = tl.cdiv(tl.cdiv(k_tiles, C), launch.split_k) * C
    first = part * part_tiles
    last = tl.minimum(first + part_tiles, k_tiles)

    # tiles past the end repeat the last one: their rows are not stored and their columns meet zeros of x
    tile_row = tl.minimum(block_n * R + tl.arange(0, R), row_tiles - 1)[:, None, None] * k_tiles
    word_at, scale_at = lane_offsets(GROUP)

    rows_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = x + rows_m[None, :].to(tl.int64) * stride_xm
    in_m = rows_m[None, :] < m
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in tl.range(first, last, C, num_stages=launch.num_stages):
        for c in tl.static_range(C):
            tile = step + c
            at = tile_row + (tile if C == 1 else tl.minimum(tile, k_tiles - 1))
            a = load_operand(words, scales, at, word_at, scale_at, kind, x.dtype.element_ty, GROUP, PTX, WGMMA)
            at_k = tile * 64 + tl.arange(0, 64)
            b = tl.load(x_rows + at_k[:, None] * stride_xk, mask=in_m & (at_k[:, None] < k), other=0.0)
            acc = tl.dot(a, b, acc)
        if WGMMA:
            acc = wait_for_products(acc)

    rows_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = rows_n < n
    mask = in_m & in_n[:, None]
    if launch.split_k == 1:
        acc *= (tl.load(multiplier + rows_n, mask=in_n, other=0.0) * GAIN)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias + rows_n, mask=in_n, other=0.0).to(tl.float32)[:, None]
        out_at = rows_m[None, :].to(tl.int64) * n + rows_n[:, None]
    else:
        out_at = (part.to(tl.int64) * m + rows_m)[None, :] * n + rows_n[:, None]
    tl.store(out + out_at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["m", "stride_part"])
def _epilogue_kernel(
    parts, multiplier, bias, out,
    m, n, stride_part, stride_out,
    GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < n
    at = row.to(tl.int64) * n + column
    acc = tl.load(parts + at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):  # always in this order: the sum repeats bit for bit
        acc += tl.load(parts + part * stride_part + at, mask=mask, other=0.0)
    acc *= tl.load(multiplier + column, mask=mask, other=0.0) * GAIN
    if HAS_BIAS:
        acc += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * stride_out + column, acc.to(out.dtype.element_ty), mask=mask)


def fused(
    x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Launch, *, ptx: bool, wgmma: bool
) -> None:
    """Launches the fused kernel into ``out``; without ``ptx`` it runs in Triton's interpreter too."""
    m, n = out.shape
    packed = packed.contiguous()
    split = launch.split_k > 1
    target = scratch((launch.split_k, m, n), torch.float32, x.device) if split else out
    submit(
        _linear_kernel, (triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n), launch.split_k),
        x, packed.words, packed.scales.view(torch.int32), *packed.per_row(bias), target,
        m, n, packed.k, *packed.words.shape[:2], x.stride(0), x.stride(1),
        kind=packed.kind, GROUP=packed.group, GAIN=UNPACK_GAIN[packed.kind], HAS_BIAS=bias is not None,
        launch=launch, PTX=ptx, WGMMA=wgmma, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    if split:
        _epilogue(target, packed, bias, out, rows=slice(0, n))


def compile_ahead(target: Target) -> bytes:
    """The machine code of the fused kernel for 16 tokens in bfloat16 and NVFP4; no GPU needed."""
    launch = plan_linear(target, 16, 4096, 4096)
    pointers = {"words": "*i32", "scales": "*i32", "multiplier": "*fp32", "x": "*bf16", "bias": "*bf16"}
    pointers["out"] = "*bf16" if launch.split_k == 1 else "*fp32"
    constants = {"kind": "e4m3", "GROUP": 16, "GAIN": UNPACK_GAIN["e4m3"], "HAS_BIAS": True, "stride_xk": 1}
    constants |= {"launch": launch, "PTX": True, "WGMMA": target.hopper}
    names = _linear_kernel.arg_names
    signature = {name: pointers.get(name) or ("constexpr" if name in constants else "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, "n", "k", "stride_xm")}
    chip = GPUTarget("cuda", 10 * target.capability[0] + target.capability[1], 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    code: bytes = triton.compile(ASTSource(_linear_kernel, signature, constants, aligned), chip, options).asm["cubin"]
    return code


def _epilogue(parts: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, rows: slice) -> None:
    """Sums float32 parts ``[p, m, n]`` into ``out`` ``[m, n]``, whose columns are ``rows`` of the weight."""
    m, n = out.shape
    block = min(_EPILOGUE_BLOCK, triton.next_power_of_2(n))
    multiplier = packed.multiplier[rows].contiguous()
    submit(
        _epilogue_kernel, (m, triton.cdiv(n, block)),
        parts, multiplier, multiplier if bias is None else bias[rows].contiguous(), out,
        m, n, parts.stride(0), out.stride(0),
        GAIN=UNPACK_GAIN[packed.kind], HAS_BIAS=bias is not None, PARTS=parts.shape[0], BLOCK=block,
    )  # fmt: skip


def through_dense(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor) -> None:
    """Writes ``code * scale`` out exactly, a block of rows at a time, and lets cuBLAS multiply into float32."""
    m, k = x.shape
    wide = x.dtype == torch.float32  # else the multiplier comes last, in float32
    powers, packed = packed.without_powers() if wide else (None, packed)
    row_tiles, k_tiles = packed.words.shape[:2]
    step = max(1, _WEIGHT_BYTES // (k_tiles * TILE * x.element_size()) // TILE)
    weight = torch.empty((min(step, row_tiles) * TILE, k_tiles * TILE), dtype=x.dtype, device=x.device)
    for first in range(0, row_tiles, step):
        tiles = slice(first, min(first + step, row_tiles))
        rows = slice(first * TILE, min(tiles.stop * TILE, packed.n))
        write_out(packed.words[tiles].contiguous(), packed.scales[tiles].contiguous(), weight, packed.kind)
        columns = rows.stop - rows.start
        if powers is not None:
            weight[:columns].mul_(powers[rows, None])
        dense = weight[:columns, :k].t()
        tokens = max(1, _PARTS_BYTES // (columns * 4))
        for start in range(0, m, tokens):
            some = x[start : start + tokens]
            part = torch.mm(some, dense) if wide else torch.mm(some, dense, out_dtype=torch.float32)
            _epilogue(part.unsqueeze(0), packed, bias, out[start : start + tokens, rows], rows)
