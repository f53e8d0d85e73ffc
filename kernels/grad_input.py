"""The gradient of an FP4 linear's input for SM80 to SM90: which kernels compute it, with which launch."""

import torch
from torch import Tensor

from marlin_w4a16.kernels.grad_launch import GradLaunch, plan_grad_input
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.grad_input import fused, through_dense
from marlin_w4a16.kernels.target import Target


def linear_grad_input(grad: Tensor, packed: PackedFP4, launch: GradLaunch | None = None) -> Tensor:
    """``grad @ weight`` on a GPU of capability 8.0 to 9.x.

    Args:
        grad: ``[m, n]`` with any strides, float16 or bfloat16.
        packed: a weight that fits the dtype of grad (see `FP4Weight.fit`); float16 turns E8M0 scales out of its range
            into NaN.
        launch: the fused kernel with these parameters instead of what the table says.

    Returns:
        ``[m, k]`` in the dtype of grad: float32 sums, rounded once; where rows have different multipliers, grad times
        these was rounded before. Equal bits on every run.
    """
    m = grad.shape[0]
    out = torch.empty((m, packed.k), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    if packed.n == 0:
        return out.zero_()
    with torch.cuda.device(grad.device):
        target = Target.of(grad.device)
        launch = launch or plan_grad_input(target, m, packed.n, packed.k)
        if launch is None:
            through_dense(grad, packed, out)
        else:
            fused(grad, packed, out, launch, ptx=True, wgmma=target.hopper)
    return out
