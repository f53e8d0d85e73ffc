"""Mixtures of FP4 experts for SM80 to SM90: tokens by expert, two products with the activation between, the sum."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.decode.route import early_launch, local_expert, sorted_tokens, tiles_of_experts
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.hopper_launch import plan_hopper_experts
from marlin_w4a16.kernels.launch import Launch, Stream, plan_experts
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable.grouped import FEW, grouped_product
from marlin_w4a16.kernels.record import Replays, scratch, submit
from marlin_w4a16.kernels.target import Target

_SUM_BLOCK = 512
_REPLAYS = Replays()


@triton.jit(do_not_specialize=["experts", "known"])
def _sum_kernel(
    parts, topk_ids, expert_map, out,
    n, experts, known,
    CHOICES: tl.constexpr, HAS_MAP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):  # always in this order: the sum repeats bit for bit
        pair = token * CHOICES + choice
        local = local_expert(topk_ids, expert_map, pair, True, known, experts, HAS_MAP) >= 0
        acc += tl.load(parts + pair.to(tl.int64) * n + column, mask=local & (column < n), other=0.0)
    tl.store(out + token.to(tl.int64) * n + column, acc.to(out.dtype.element_ty), mask=column < n)


def moe(x: Tensor, experts: Experts, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """``marlin_w4a16::moe`` on a GPU of capability 8.0 to 9.x, for float16 and bfloat16.

    Args:
        x: ``[tokens, hidden]``, any strides.
        experts: weights that fit the dtype of x.
        topk_weights, topk_ids: ``[tokens, k]``.
        expert_map: as for the op.

    Returns:
        ``[tokens, hidden]``: sums and routing weights in float32, what stands between the products rounded to the
        dtype of x, the result rounded once. Equal bits on every run.
    """
    out = torch.empty((x.shape[0], experts.w2.n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if topk_ids.numel() == 0:
        return out.zero_()
    with torch.cuda.device(x.device):
        _choose(x, experts, topk_weights, topk_ids, expert_map, out)
    return out


def moe_into(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    words13: Tensor,
    scales13: Tensor,
    multiplier13: Tensor,
    words2: Tensor,
    scales2: Tensor,
    multiplier2: Tensor,
    bias13: Tensor | None,
    bias2: Tensor | None,
    expert_map: Tensor | None,
    format13: tuple[Any, ...],
    format2: tuple[Any, ...],
    activation: tuple[Any, ...],
    weight_on_input: bool,
    out: Tensor,
) -> None:
    """`moe` for as little of the host's time as there may be: calls that were made before are replayed.

    Nothing is checked; all tensors but x, routing weights and ids are contiguous.

    Args:
        x, topk_weights, topk_ids, bias13, bias2, expert_map, weight_on_input: see `moe`.
        words13, scales13, multiplier13, words2, scales2, multiplier2: of the weights.
        format13, format2: their n, k, kind and group.
        activation: the fields of an `Activation`.
        out: ``[tokens, hidden]``, contiguous, which is written.
    """
    if not topk_ids.numel():
        out.zero_()
        return
    weights = words13, scales13, multiplier13, words2, scales2, multiplier2
    optional = bias13, bias2, expert_map
    tensors = (x, topk_weights, topk_ids, out, *weights, *[t for t in optional if t is not None])
    kept = x.is_contiguous() and topk_weights.is_contiguous() and topk_ids.is_contiguous()
    key = (
        x.get_device(), x.shape, topk_ids.shape, x.dtype, topk_weights.dtype, topk_ids.dtype, words13.shape[0],
        format13, format2, activation, weight_on_input,
        *[None if t is None else (t.dtype, t.shape[0]) for t in optional],
    )  # fmt: skip
    if not (kept and _REPLAYS.run(key, tensors)):
        w13, w2 = PackedFP4(*weights[:3], *format13), PackedFP4(*weights[3:], *format2)
        experts = Experts(w13, w2, Activation(*activation), bias13, bias2, weight_on_input)
        call = functools.partial(_choose, x, experts, topk_weights, topk_ids, expert_map, out)
        _REPLAYS.record(key if kept else None, tensors, call)


def _choose(
    x: Tensor, experts: Experts, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, out: Tensor
) -> None:
    target, pairs = Target.of(x.device), topk_ids.numel()
    if target.gluon:
        launches = plan_hopper_experts(target.processors, pairs, experts.count, experts.w13.n, experts.w2.n)
        _on_hopper(x, experts, topk_weights, topk_ids, expert_map, out, *launches)
    else:
        launch = plan_experts(pairs, experts.count)
        fused(x, experts, topk_weights, topk_ids, expert_map, out, launch, ptx=True, wgmma=target.hopper)


def fused(
    x: Tensor,
    experts: Experts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    out: Tensor,
    launch: Launch | None,
    *,
    ptx: bool,
    wgmma: bool,
) -> None:
    """Launches the portable kernels into ``out``; without ``ptx`` they run in Triton's interpreter too.

    ``launch`` is for tiles of tokens that share an expert; None: for so few tokens that each has its own.
    """
    pairs, k = topk_ids.numel(), topk_ids.shape[1]
    topk_ids, topk_weights = topk_ids.contiguous(), topk_weights.contiguous()
    expert_map = None if expert_map is None else expert_map.contiguous()
    how: dict[str, Any] = {"ptx": ptx, "wgmma": wgmma, "expert_map": expert_map}
    tiles = topk_ids if launch is None else tiles_of_experts(topk_ids, expert_map, experts.count, launch.block_m)
    launch = launch or FEW
    hidden = scratch((pairs, experts.w2.k), x.dtype, x.device)
    parts = scratch((pairs, experts.w2.n), torch.float32, x.device)
    on_input = experts.weight_on_input
    grouped_product(
        x, experts.w13, experts.bias13, hidden, tiles, launch, choices=k, activation=experts.activation,
        weights=topk_weights if on_input else None, weighted="input", **how,
    )  # fmt: skip
    grouped_product(
        hidden, experts.w2, experts.bias2, parts, tiles, launch, choices=1,
        weights=None if on_input else topk_weights, weighted="output", **how,
    )  # fmt: skip
    _sum(parts, topk_ids, expert_map, experts.count, out)


def _on_hopper(
    x: Tensor,
    experts: Experts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    out: Tensor,
    first: Stream,
    second: Stream,
) -> None:
    from marlin_w4a16.kernels.hopper.experts import stream_experts  # Gluon, which moves between Triton's releases

    pairs = topk_ids.numel()
    w13, w2, weights = experts.w13.contiguous(), experts.w2.contiguous(), topk_weights.contiguous()
    tiles, tokens = sorted_tokens(x, topk_ids, expert_map, experts.count, first.block_m)
    hidden = scratch((pairs, w2.k), x.dtype, x.device)
    parts = scratch((pairs, w2.n), torch.float32, x.device)
    on_input, on_output = (weights, None) if experts.weight_on_input else (None, weights)
    stream_experts(
        tokens, w13, experts.bias13, hidden, tiles, first, activation=experts.activation,
        weights=on_input, weighted="input",
    )  # fmt: skip
    stream_experts(hidden, w2, experts.bias2, parts, tiles, second, weights=on_output, weighted="output", to_pairs=True)
    _sum(parts, topk_ids, expert_map, experts.count, out, pdl=True)


def _sum(
    parts: Tensor, topk_ids: Tensor, expert_map: Tensor | None, experts: int, out: Tensor, pdl: bool = False
) -> None:
    """Adds the float32 parts of the choices of each token, without those of experts that are not local."""
    tokens, n = out.shape
    block = min(_SUM_BLOCK, triton.next_power_of_2(n))
    submit(
        _sum_kernel, (tokens, triton.cdiv(n, block)),
        parts, topk_ids.contiguous(), topk_ids if expert_map is None else expert_map.contiguous(), out,
        n, experts, 0 if expert_map is None else len(expert_map),
        CHOICES=topk_ids.shape[1], HAS_MAP=expert_map is not None, BLOCK=block, **early_launch(pdl),
    )  # fmt: skip
