"""What the Gluon kernels share: the decode step, from packed words to the operand of an MMA, and the epilogue.

Gluon has no stable interface. What its releases name differently is chosen here; read in Triton 3.6 to 3.9.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from marlin_w4a16.kernels.decode import unpack

unpack_words, _pairs = gluon.jit(unpack.unpack_words.fn), gluon.jit(unpack.scale_pairs.fn)
# one box of a tensor, by the copy engine; renamed in Triton 3.8 or 3.9
copy_to_shared = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def write_tile(
    acc, multiplier, bias, out, first_n, first_m, m, n, GAIN: gl.constexpr, HAS_BIAS: gl.constexpr,
    OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Writes float32 sums ``[rows, tokens]`` to ``out`` ``[m, n]``: multiplier and bias in float32, one rounding."""
    acc_n = first_n + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    y = acc * (gl.load(multiplier + acc_n, mask=acc_n < n, other=0.0) * GAIN)[:, None]
    if HAS_BIAS:
        y += gl.load(bias + acc_n, mask=acc_n < n, other=0.0).to(gl.float32)[:, None]
    y = gl.convert_layout(y.to(out.dtype.element_ty), OUT_LAYOUT)
    rows_n = first_n + gl.arange(0, acc.shape[0], gl.SliceLayout(1, OUT_LAYOUT))
    rows_m = first_m + gl.arange(0, acc.shape[1], gl.SliceLayout(0, OUT_LAYOUT))
    to = rows_m[None, :].to(gl.int64) * n + rows_n[:, None]
    gl.store(out + to, y, mask=(rows_n < n)[:, None] & (rows_m < m)[None, :])


@gluon.jit
def scale_pairs(words, kind: gl.constexpr, dtype: gl.constexpr, GROUP: gl.constexpr):
    """Scale words ``[..., 32 / GROUP]`` of a lane as the pairs of its rows (see `unpack.scale_pairs`).

    What is added to the dimensions makes, flat with the last one, the four k-steps of a tile.
    """
    pairs = _pairs(words, kind, dtype)
    if GROUP == 32:  # a group serves two k-steps
        pairs = gl.join(pairs, pairs)
    return pairs
