"""The gradient of an FP4 linear's input for SM80 to SM90: which kernels compute it, with which launch."""

import functools
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.grad_launch import GradLaunch, plan_grad_input
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.grad_input import fused, through_dense
from marlin_w4a16.kernels.record import Replays
from marlin_w4a16.kernels.replay import Replay
from marlin_w4a16.kernels.scale_bytes import ScaleKind
from marlin_w4a16.kernels.target import Target

_REPLAYS = Replays()


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
        _choose(grad, packed, out, launch)
    return out


def grad_input_into(
    grad: Tensor,
    words: Tensor,
    scales: Tensor,
    multiplier: Tensor,
    n: int,
    k: int,
    group: int,
    kind: ScaleKind,
    out: Tensor,
) -> None:
    """`linear_grad_input` for as little of the host's time as there may be: calls that were made before are replayed.

    Nothing is checked; the weight's tensors are contiguous.

    Args:
        grad: ``[..., n]``, of some columns.
        words, scales, multiplier: see `PackedFP4`, as n, k, group and kind.
        n, k, group, kind: of the weight.
        out: ``[..., k]``, contiguous, which is written.
    """
    if not out.numel():
        return
    tensors = grad, words, scales, multiplier, out
    key = _key(grad, n, k, group, kind)
    if not (grad.is_contiguous() and _REPLAYS.run(key, tensors)):
        packed = PackedFP4(words, scales, multiplier, n, k, kind, group)
        call = functools.partial(_choose, grad.reshape(-1, n), packed, out.view(-1, k))
        _REPLAYS.record(key if grad.is_contiguous() else None, tensors, call)


def bound(grad: Tensor, packed: PackedFP4) -> Replay | None:
    """A call of `grad_input_into` that was made, for addresses of grad and its output: the weight stays where it is."""
    replay = _REPLAYS.get(_key(grad, packed.n, packed.k, packed.group, packed.kind))
    return None if replay is None else replay.bind({1: packed.words, 2: packed.scales, 3: packed.multiplier})


def _key(grad: Tensor, n: int, k: int, group: int, kind: ScaleKind) -> tuple[Any, ...]:
    return grad.get_device(), grad.numel(), grad.dtype, n, k, group, kind


def _choose(grad: Tensor, packed: PackedFP4, out: Tensor, launch: GradLaunch | None = None) -> None:
    target = Target.of(grad.device)
    launch = launch or plan_grad_input(target, grad.shape[0], packed.n, packed.k)
    if launch is None:
        through_dense(grad, packed, out)
    else:
        fused(grad, packed, out, launch, ptx=True, wgmma=target.hopper)
