"""A packed weight written out in 16 or 32 bits, for cuBLAS: ``code * scale``, exact, without the multiplier."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from marlin_w4a16.kernels.decode.unpack import lane_offsets, load_rows
from marlin_w4a16.kernels.layout import TILE
from marlin_w4a16.kernels.record import submit
from marlin_w4a16.kernels.scale_bytes import ScaleKind

_TILES = 2  # side by side, of a program: a row of them is two lines of memory in 16 bits


@triton.jit(do_not_specialize=["k_tiles", "first", "count"])
def _decode_kernel(
    words, scales, out,
    k_tiles, first, count, stride,
    kind: tl.constexpr, GROUP: tl.constexpr, TILES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = tl.float16 if out.dtype.element_ty == tl.float16 else tl.bfloat16
    blocks = tl.cdiv(count, TILES)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    # tiles past the end repeat the last one, and are not stored
    tile = row * k_tiles + first + tl.minimum(block * TILES + tl.arange(0, TILES), count - 1)
    word_at, scale_at = lane_offsets(GROUP)
    a = load_rows(words, scales, tile[:, None, None], word_at, scale_at, kind, dtype, GROUP, PTX)
    column = block * TILES * 64 + tl.arange(0, TILES * 64)
    at = (row * 64 + tl.arange(0, 64))[:, None] * stride + column[None, :]
    tl.store(out + at, a.to(out.dtype.element_ty), mask=(column < count * 64)[None, :])


def write_out(
    words: Tensor, scales: Tensor, out: Tensor, kind: ScaleKind, columns: slice | None = None, *, ptx: bool = True
) -> None:
    """Writes the values of tiles ``[R, C, ...]``, contiguous, to the first ``64 R`` rows of ``out``.

    Args:
        words, scales: of a packed weight, or some rows of its tiles.
        out: ``[at least 64 R, at least 64 tiles of columns]``, rows contiguous; float16, else bfloat16 or float32.
        kind: of the scales. Values of E4M3 carry a factor of ``2**-7`` (unpack.py).
        columns: the tiles of columns that are written, from the first column of ``out`` on; None for all.
        ptx: without it the kernel runs in Triton's interpreter too.
    """
    row_tiles, k_tiles = words.shape[:2]
    first, stop, _ = (columns or slice(None)).indices(k_tiles)
    submit(
        _decode_kernel, (row_tiles * triton.cdiv(stop - first, _TILES),),
        words, scales.view(torch.int32), out, k_tiles, first, stop - first, out.stride(0),
        kind=kind, GROUP=TILE * TILE // scales.shape[2], TILES=_TILES, PTX=ptx,
    )  # fmt: skip
