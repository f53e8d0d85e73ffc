"""The activation of an expert inside a kernel, in Triton and in Gluon: `experts.Activation` on float32 sums."""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import triton
import triton.language as tl

from marlin_w4a16.kernels.activation import Activation

_NAMES = ("FUNCTION", "GATED", "ALPHA", "GATE_LIMIT", "UP_LIMIT", "UP_OFFSET")


@triton.jit
def activate(
    sums,
    FUNCTION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_LIMIT: tl.constexpr,
    UP_LIMIT: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """The activation of sums ``[rows, tokens]`` in packed order (experts.py): ``[rows / 2, tokens]`` if gated.

    Comparisons instead of minima keep a NaN.
    """
    z = sums
    if GATED:
        pairs = sums.reshape((sums.shape[0] // 16, 2, 8, sums.shape[1])).permute((0, 2, 3, 1))
        z, up = pairs.split()
        z = z.reshape((sums.shape[0] // 2, sums.shape[1]))
        up = up.reshape((sums.shape[0] // 2, sums.shape[1]))
    if GATE_LIMIT is not None:
        z = tl.where(z > GATE_LIMIT, GATE_LIMIT, z)
    if FUNCTION == "silu":
        z = z / (1.0 + tl.exp(-ALPHA * z))
    elif FUNCTION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    else:
        z = tl.where(z < 0.0, 0.0, z)
        if FUNCTION == "relu2":
            z = z * z
    if GATED:
        if UP_LIMIT is not None:
            up = tl.where(up > UP_LIMIT, UP_LIMIT, up)
            up = tl.where(up < -UP_LIMIT, -UP_LIMIT, up)
        z = z * (up + UP_OFFSET)
    return z


def activation_constants(activation: Activation | None) -> Mapping[str, Any]:
    """The compile-time parameters of `activate`; of None, those of no activation."""
    return dict(zip(_NAMES, (None,) * 6 if activation is None else astuple(activation), strict=True))
