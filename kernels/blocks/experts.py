"""Mixtures of experts and grouped linears in plain torch, for every device: expert by expert, in float32."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from marlin_w4a16.kernels.blocks.dequantize import linear_by_blocks, linear_grad_input
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.layout import PackedFP4


def local_experts(topk_ids: Tensor, expert_map: Tensor | None, experts: int) -> Tensor:
    """The expert of each pair of token and choice, flat, as int64; -1 where it is not one of these ``experts``."""
    ids = topk_ids.reshape(-1).long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < len(expert_map))
        places = torch.nn.functional.pad(expert_map.long(), (0, 1), value=-1)  # one that is always there
        ids = places[torch.where(known, ids, len(expert_map))]
    return torch.where((ids >= 0) & (ids < experts), ids, -1)


def moe_by_blocks(
    x: Tensor, experts: Experts, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None
) -> Tensor:
    """What `moe.moe` computes, for x ``[tokens, hidden]``: no more than some rows of a weight are decoded at a time."""
    tokens, k = topk_ids.shape
    y = torch.zeros((tokens * k, experts.w2.n), dtype=torch.float32, device=x.device)
    for expert, pairs in _pairs(local_experts(topk_ids, expert_map, experts.count)):
        _, weight, _, product = _products(x, experts, topk_weights, expert, pairs)
        y[pairs] = product if experts.weight_on_input else product * weight
    return y.view(tokens, k, experts.w2.n).sum(1).to(x.dtype)


def _products(
    x: Tensor, experts: Experts, topk_weights: Tensor, expert: int, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens and routing weights of an expert's pairs, the sums of its first product, and its second product.

    What stands between the products is rounded to the dtype of x.
    """
    rows, weight = x[pairs // topk_weights.shape[1]].float(), topk_weights.reshape(-1)[pairs, None].float()
    first, second = (None if bias is None else bias[expert] for bias in (experts.bias13, experts.bias2))
    sums = linear_by_blocks(rows * weight if experts.weight_on_input else rows, experts.w13.matrix(expert), first)
    hidden = experts.activation.of_rows(sums).to(x.dtype).float()
    return rows, weight, sums, linear_by_blocks(hidden, experts.w2.matrix(expert), second)


def moe_gradients(
    grad: Tensor, x: Tensor, experts: Experts, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the routing weights and of the biases (empty where there are none), in their dtypes."""
    k, w13, w2 = topk_ids.shape[1], experts.w13, experts.w2
    of_x = torch.zeros((topk_ids.numel(), x.shape[1]), dtype=torch.float32, device=x.device)
    of_weights = torch.zeros(topk_weights.shape, dtype=torch.float32, device=x.device)
    of_bias13, of_bias2 = (torch.zeros(w.multiplier.shape, device=x.device) for w in (w13, w2))
    for expert, pairs in _pairs(local_experts(topk_ids, expert_map, experts.count)):
        rows, weight, sums, y = _products(x, experts, topk_weights, expert, pairs)
        of_y = grad[pairs // k].float() if experts.weight_on_input else grad[pairs // k].float() * weight
        of_sums = experts.activation.gradient_of_rows(linear_grad_input(of_y, w2.matrix(expert)), sums)
        of_rows = linear_grad_input(of_sums, w13.matrix(expert))
        if experts.weight_on_input:
            of_x[pairs], of_weights.view(-1)[pairs] = of_rows * weight, (of_rows * rows).sum(1)
        else:
            of_x[pairs], of_weights.view(-1)[pairs] = of_rows, (grad[pairs // k].float() * y).sum(1)
        of_bias13[expert], of_bias2[expert] = of_sums.sum(0), of_y.sum(0)
    return (
        of_x.view(len(x), k, x.shape[1]).sum(1).to(x.dtype),
        of_weights.to(topk_weights.dtype),
        x.new_empty(0) if experts.bias13 is None else of_bias13.to(experts.bias13.dtype),
        x.new_empty(0) if experts.bias2 is None else of_bias2.to(experts.bias2.dtype),
    )


def _pairs(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The experts that are chosen, in their order, and the pairs that chose each."""
    order = torch.argsort(experts, stable=True)
    found, counts = torch.unique_consecutive(experts[order], return_counts=True)
    for expert, pairs in zip(found.tolist(), order.split(counts.tolist()), strict=True):
        if expert >= 0:
            yield expert, pairs


def grouped_linear_by_blocks(x: Tensor, packed: PackedFP4, offsets: Tensor) -> Tensor:
    """What `grouped_linear` computes, for x ``[rows, k]``; zeros past the last offset."""
    out = torch.zeros((x.shape[0], packed.n), dtype=x.dtype, device=x.device)
    for expert, rows in _groups(offsets):
        out[rows] = linear_by_blocks(x[rows].contiguous(), packed.matrix(expert), None)
    return out


def grouped_linear_grad_input(
    grad: Tensor,
    packed: PackedFP4,
    offsets: Tensor,
    product: Callable[[Tensor, PackedFP4], Tensor] = linear_grad_input,
) -> Tensor:
    """The gradient of x of a grouped linear, for ``grad`` ``[rows, n]``; ``product`` computes that of an expert."""
    out = torch.zeros((grad.shape[0], packed.k), dtype=grad.dtype, device=grad.device)
    for expert, rows in _groups(offsets):
        out[rows] = product(grad[rows].contiguous(), packed.matrix(expert))
    return out


def _groups(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            yield expert, slice(start, stop)
        start = max(start, stop)
