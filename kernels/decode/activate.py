"""The activation of an expert inside a kernel, in Triton and in Gluon: `Activation` on float32 sums."""

import triton
import triton.language as tl


@triton.jit
def activate(sums, activation: tl.constexpr):
    """An `Activation` of sums ``[rows, tokens]`` in packed order (experts.py): ``[rows / 2, tokens]`` if gated.

    None leaves them as they are. Comparisons instead of minima keep a NaN.
    """
    z = sums
    if activation is not None:
        if activation.gated:
            pairs = sums.reshape((sums.shape[0] // 16, 2, 8, sums.shape[1])).permute((0, 2, 3, 1))
            z, up = pairs.split()
            z = z.reshape((sums.shape[0] // 2, sums.shape[1]))
            up = up.reshape((sums.shape[0] // 2, sums.shape[1]))
        if activation.gate_limit is not None:
            z = tl.where(z > activation.gate_limit, activation.gate_limit, z)
        if activation.function == "silu":
            z = z / (1.0 + tl.exp(-activation.alpha * z))
        elif activation.function == "gelu":
            z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        elif activation.function == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
            z = z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        else:
            z = tl.where(z < 0.0, 0.0, z)
            if activation.function == "relu2":
                z = z * z
        if activation.gated:
            if activation.up_limit is not None:
                up = tl.where(up > activation.up_limit, activation.up_limit, up)
                up = tl.where(up < -activation.up_limit, -activation.up_limit, up)
            z = z * (up + activation.up_offset)
    return z
