"""Mixtures and grouped linears in float64 from the exactly decoded weights, expert by expert, on any device."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.fp4 import FP4Weight
from mixtures.oracle import Mixture, activated, draw_mixture, matrix


def drawn(dtype: torch.dtype, *args: Any, **more: Any) -> tuple[Mixture, Experts]:
    """A mixture with biases that the dtype holds, and as the kernels take it."""
    mixture = draw_mixture(*args, **more)
    biases = {"bias13": mixture.bias13, "bias2": mixture.bias2}
    biases = {name: None if b is None else b.to(dtype).double() for name, b in biases.items()}
    mixture = replace(mixture, **biases)
    return mixture, mixture.packed(dtype)


def exact_mixture(
    mixture: Mixture,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None = None,
    hidden: torch.dtype = torch.float64,
) -> Tensor:
    """The result before it is rounded, with what stands between the products rounded to ``hidden``."""
    out = torch.zeros(len(x), mixture.w2.n, dtype=torch.float64, device=x.device)
    local = topk_ids.long()
    if expert_map is not None:
        inside = (local >= 0) & (local < len(expert_map))
        local = torch.where(inside, expert_map.long()[local.where(inside, 0)], -1)
    for expert in local.unique().tolist():
        if not 0 <= expert < len(mixture.w13.codes):
            continue
        token, choice = (local == expert).nonzero(as_tuple=True)
        weight = topk_weights[token, choice, None].double()
        rows = x[token].double() * (weight if mixture.weight_on_input else 1)
        sums = rows @ matrix(mixture.w13, expert).T
        sums = sums if mixture.bias13 is None else sums + mixture.bias13[expert]
        between = activated(mixture.activation, mixture.order, sums).to(hidden).double()
        y = between @ matrix(mixture.w2, expert)[:, : mixture.intermediate].T
        y = y if mixture.bias2 is None else y + mixture.bias2[expert]
        out.index_add_(0, token, y if mixture.weight_on_input else y * weight)
    return out


def exact_groups(weight: FP4Weight, x: Tensor, offsets: Tensor) -> Tensor:
    """A grouped linear; zeros past the last offset."""
    out = torch.zeros(len(x), weight.n, dtype=torch.float64, device=x.device)
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        if stop > start:
            out[start:stop] = x[start:stop].double() @ matrix(weight, expert).T
        start = stop
    return out
