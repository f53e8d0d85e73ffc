"""The FP4 linear for SM80 to SM90: which kernel runs it, with which launch."""

import torch
from torch import Tensor

from marlin_w4a16.kernels.launch import Launch, Rows, Stream, plan_dense, plan_hopper, plan_linear
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.linear import fused, through_dense
from marlin_w4a16.kernels.target import Target


def linear(
    x: Tensor, packed: PackedFP4, bias: Tensor | None = None, launch: Launch | Rows | Stream | None = None
) -> Tensor:
    """``x @ weight.T + bias`` on a GPU of capability 8.0 to 9.x.

    Args:
        x: ``[m, k]`` with any strides: float16 or bfloat16, or float32, whose weight is written out for cuBLAS.
        packed: a weight that fits the dtype of x (see `FP4Weight.fit`); float16 turns E8M0 scales out of its range
            into NaN.
        bias: ``[n]`` of any floating dtype, added in float32.
        launch: the kernel with these parameters instead of what the tables say.

    Returns:
        ``[m, n]`` in the dtype of x: sums, multiplier and bias in float32, rounded once. Equal bits on every run.
    """
    m = x.shape[0]
    out = torch.empty((m, packed.n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if packed.k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    with torch.cuda.device(x.device):
        target = Target.of(x.device)
        if launch is None and target.gluon and x.dtype != torch.float32:
            launch = plan_hopper(target.processors, m, packed.n, packed.k)
        if launch is None and (plan_dense(m) or x.dtype == torch.float32):
            through_dense(x, packed, bias, out)
            return out
        launch = launch or plan_linear(target, m, packed.n, packed.k)
        if isinstance(launch, Launch):
            fused(x, packed, bias, out, launch, ptx=True, wgmma=target.hopper)
        else:
            _on_hopper(x, packed, bias, out, launch)
    return out


def _on_hopper(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Rows | Stream) -> None:
    from marlin_w4a16.kernels.hopper.rows import by_rows  # Gluon, which moves between Triton's releases
    from marlin_w4a16.kernels.hopper.stream import stream

    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # what the copy engine asks for
        x = x.clone(memory_format=torch.contiguous_format)
    if isinstance(launch, Rows):
        by_rows(x, packed.contiguous(), bias, out, launch)
    else:
        stream(x, packed.contiguous(), bias, out, launch)
