"""The FP4 linear for SM80 to SM90: which kernel runs it, with which launch."""

import functools
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.hopper_launch import plan_hopper
from marlin_w4a16.kernels.launch import Launch, Rows, Stream, plan_dense, plan_linear
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.linear import fused, through_dense
from marlin_w4a16.kernels.record import Replays
from marlin_w4a16.kernels.replay import Replay
from marlin_w4a16.kernels.scale_bytes import ScaleKind
from marlin_w4a16.kernels.target import Target

_REPLAYS = Replays()


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
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if packed.k == 0:
        return out.zero_() if bias is None else out.copy_(bias.expand_as(out))
    with torch.cuda.device(x.device):
        _choose(x, packed, bias, out, launch)
    return out


def linear_into(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    multiplier: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    group: int,
    kind: ScaleKind,
    out: Tensor,
) -> None:
    """`linear` for as little of the host's time as there may be: calls that were made before are replayed.

    Nothing is checked; the weight's tensors and bias are contiguous.

    Args:
        x: ``[..., k]``, of some columns.
        words, scales, multiplier: see `PackedFP4`, as n, k, group and kind.
        bias: ``[n]`` or None.
        n, k, group, kind: of the weight.
        out: ``[..., n]``, contiguous, which is written.
    """
    if not x.numel():
        return
    tensors = (x, words, scales, multiplier, out) if bias is None else (x, words, scales, multiplier, out, bias)
    key = _key(x, n, k, group, kind, bias)
    if not (x.is_contiguous() and _REPLAYS.run(key, tensors)):
        packed = PackedFP4(words, scales, multiplier, n, k, kind, group)
        call = functools.partial(_choose, x.reshape(-1, k), packed, bias, out.view(-1, n))
        _REPLAYS.record(key if x.is_contiguous() else None, tensors, call)


def bound(x: Tensor, packed: PackedFP4, bias: Tensor | None) -> Replay | None:
    """A call of `linear_into` that was made, for addresses of x and its output: weight and bias stay where they are."""
    replay = _REPLAYS.get(_key(x, packed.n, packed.k, packed.group, packed.kind, bias))
    fixed = {1: packed.words, 2: packed.scales, 3: packed.multiplier, **({} if bias is None else {5: bias})}
    return None if replay is None else replay.bind(fixed)


def _key(x: Tensor, n: int, k: int, group: int, kind: ScaleKind, bias: Tensor | None) -> tuple[Any, ...]:
    return x.get_device(), x.numel(), x.dtype, n, k, group, kind, None if bias is None else bias.dtype


def _choose(
    x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Launch | Rows | Stream | None = None
) -> None:
    target, m = Target.of(x.device), x.shape[0]
    if launch is None and target.gluon and x.dtype != torch.float32:
        launch = plan_hopper(target.processors, m, packed.n, packed.k)
    if launch is None and (plan_dense(m) or x.dtype == torch.float32):
        through_dense(x, packed, bias, out)
        return
    launch = launch or plan_linear(target, m, packed.n, packed.k)
    if isinstance(launch, Launch):
        fused(x, packed, bias, out, launch, ptx=True, wgmma=target.hopper)
    else:
        _on_hopper(x, packed, bias, out, launch)


def _on_hopper(x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, launch: Rows | Stream) -> None:
    from marlin_w4a16.kernels.hopper.rows import by_rows  # Gluon, which moves between Triton's releases
    from marlin_w4a16.kernels.hopper.stream import stream

    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # what the copy engine asks for
        x = x.clone(memory_format=torch.contiguous_format)
    if isinstance(launch, Rows):
        by_rows(x, packed.contiguous(), bias, out, launch)
    else:
        stream(x, packed.contiguous(), bias, out, launch)
