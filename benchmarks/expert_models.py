"""Mixtures of experts of known models: their sizes, random FP4 weights and routing, and what they compute exactly.

Every expert has the same global scale: Humming takes no factor per row.
"""

from dataclasses import dataclass, replace

import torch
from peers import FORMATS, GLOBAL_SCALE, SCALE_BYTES
from torch import Tensor, nn

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.fp4 import FP4Weight


@dataclass(frozen=True)
class Mixture:
    """The sizes of a mixture, and what an expert computes; ``order`` is None where it has no gates."""

    experts: int
    k: int
    hidden: int
    intermediate: int
    activation: Activation
    order: Order | None
    biases: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of both products."""
        rows = self.intermediate * (1 if self.order is None else 2)
        return (rows, self.hidden), (self.hidden, self.intermediate)

    def between(self, sums: Tensor) -> Tensor:
        """What stands between the products, in the operations of a model."""
        if self.order is None:
            return self.activation(sums)
        gate, up = (sums[..., ::2], sums[..., 1::2]) if self.order == "interleaved" else sums.chunk(2, -1)
        return nn.functional.silu(gate) * up if self.activation == Activation() else self.activation(gate, up)


MODELS = {
    "gpt-oss-20b": Mixture(32, 4, 2880, 2880, Activation("silu", True, 1.702, 7.0, 7.0, 1.0), "interleaved", True),
    "qwen3-30b-a3b": Mixture(128, 8, 2048, 768, Activation(), "gate_up"),
    "deepseek-v3-tp8": Mixture(256, 8, 7168, 256, Activation(), "gate_up"),
    "nemotron-3": Mixture(128, 6, 2688, 1856, Activation("relu2", False), None),
}


@dataclass(frozen=True)
class Weights:
    """The experts of a mixture: ``[experts, rows, columns]``, biases ``[experts, rows]`` or None."""

    mixture: Mixture
    w13: FP4Weight
    w2: FP4Weight
    bias13: Tensor | None
    bias2: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Routing:
    """What tokens chose: ``[tokens, k]``, and how many experts that are."""

    weights: Tensor
    ids: Tensor
    touched: int


def draw(mixture: Mixture, name: str, dtype: torch.dtype, device: str = "cuda") -> Weights:
    """Random codes and scales of common sizes, a global scale for each product."""
    kind, group = FORMATS[name]

    def stack(n: int, k: int) -> FP4Weight:
        lead = (mixture.experts, n)
        codes = torch.randint(0, 256, (*lead, k // 2), dtype=torch.uint8, device=device)
        scales = torch.randint(*SCALE_BYTES[kind], (*lead, k // group), dtype=torch.uint8, device=device)
        return FP4Weight(codes, scales, torch.full(lead, GLOBAL_SCALE[kind], device=device), kind, group)

    def bias(n: int) -> Tensor | None:
        return torch.randn(mixture.experts, n, dtype=dtype, device=device) if mixture.biases else None

    first, second = mixture.shapes
    return Weights(mixture, stack(*first), stack(*second), bias(first[0]), bias(second[0]), dtype)


def choose(tokens: int, mixture: Mixture, dtype: torch.dtype, device: str = "cuda") -> Routing:
    """Distinct experts for each token, all as likely, with weights that add up to one."""
    logits, ids = torch.randn(tokens, mixture.experts, device=device).topk(mixture.k)
    return Routing(logits.softmax(-1).to(dtype), ids, len(ids.unique()))


def exact(x: Tensor, weights: Weights, routing: Routing) -> Tensor:
    """What the mixture is, in float64 of the exact decode."""
    out = torch.zeros(len(x), weights.mixture.hidden, dtype=torch.float64, device=x.device)
    for expert in routing.ids.unique().tolist():
        token, choice = (routing.ids == expert).nonzero(as_tuple=True)
        rows = x[token].double()
        for weight, bias, between in (
            (weights.w13, weights.bias13, weights.mixture.between),
            (weights.w2, weights.bias2, lambda y: y),
        ):
            rows = rows @ matrix(weight, expert).decode().T
            rows = between(rows if bias is None else rows + bias[expert].double())
        out.index_add_(0, token, rows * routing.weights[token, choice, None].double())
    return out


def matrix(weight: FP4Weight, expert: int) -> FP4Weight:
    parts = {name: getattr(weight, name)[expert] for name in ("codes", "scales", "multiplier")}
    return replace(weight, **parts)


def decoded(weight: FP4Weight, dtype: torch.dtype) -> Tensor:
    """All matrices, each element rounded once."""
    dense = torch.empty(len(weight.codes), weight.n, weight.k, dtype=dtype, device=weight.codes.device)
    for expert in range(len(dense)):
        dense[expert] = matrix(weight, expert).decode(dtype)
    return dense
