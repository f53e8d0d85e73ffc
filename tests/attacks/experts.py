"""Mixtures of FP4 experts in which every value on the way can be changed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from marlin_w4a16 import FP4Weight, quantize_nvfp4
from mixtures.experts import hold_fp4


class At(NamedTuple):
    """What pairs of a token and an expert are: of each its expert, token, choice, routing weight, and input."""

    expert: Tensor
    token: Tensor
    choice: Tensor
    weight: Tensor
    rows: Tensor


def of_pairs(x: Tensor, weights: Tensor, ids: Tensor) -> At:
    """The pairs ``[tokens, choices]``."""
    token = torch.arange(ids.shape[0])[:, None].expand(ids.shape)
    return At(ids, token, torch.arange(ids.shape[1]).expand(ids.shape), weights, x)


def _sorted(m: "Experts", x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' ``grouped_mm``: the pairs by expert, and the order they came in."""
    k = ids.shape[1]
    expert, perm = torch.sort(ids.reshape(-1))
    perm = m.at("perm", perm)
    at = At(expert, perm // k, perm % k, weights.reshape(-1)[m.at("perm of weights", perm)], x[perm // k])
    counted = torch.histc(expert.float(), bins=m.experts, min=0, max=m.experts - 1)
    offsets = torch.cumsum(counted, dim=0, dtype=torch.int32)
    return m.expert(at, lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w.mT, offsets)), perm


def grouped(m: "Experts", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y, perm = _sorted(m, x, weights, ids)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return m.total(y[m.at("inverse", inverse)].view(len(x), ids.shape[1], -1))


def added(m: "Experts", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    y, perm = _sorted(m, x, weights, ids)
    return torch.zeros_like(x).index_add_(0, m.at("inverse", perm) // ids.shape[1], y)


def batched(m: "Experts", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A matrix for each row, as transformers' ``batched_mm``."""
    k, pairs = ids.shape[1], of_pairs(x, weights, ids)
    expert = ids.reshape(-1)
    at = At(
        expert, pairs.token.reshape(-1), pairs.choice.reshape(-1), weights.reshape(-1), x.repeat_interleave(k, dim=0)
    )
    y = m.expert(at, lambda x, w: torch.bmm(w[expert], x.unsqueeze(-1)).squeeze(-1))
    return m.total(y.view(len(x), k, -1))


def einsum(m: "Experts", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A matrix for each token and expert of it."""
    at = of_pairs(x.unsqueeze(1).expand(-1, ids.shape[1], -1), weights, ids)
    return m.total(m.expert(at, lambda x, w: torch.einsum("tek,tenk->ten", x, w[ids])))


def dense(m: "Experts", x: Tensor, scores: Tensor, _: Tensor) -> Tensor:
    """Every expert on every token, as Llama 4 and the first gpt-oss: scores ``[tokens, experts]`` are mostly zero."""
    tokens, experts = scores.shape
    expert = torch.arange(experts)[:, None].expand(experts, tokens)
    token = torch.arange(tokens).expand(experts, tokens)
    at = At(expert, token, torch.zeros_like(token), scores.t(), x.repeat(experts, 1).view(experts, tokens, -1))
    return m.total(m.expert(at, lambda x, w: torch.bmm(x, w.mT)).transpose(0, 1))


FORMS = {form.__name__: form for form in (grouped, added, batched, einsum, dense)}


@dataclass(frozen=True)
class Activation:
    """What stands between the products.

    Attributes:
        gated: the first product gives gates and ups.
        split: sums -> gates and ups, where there are both.
        function: of gates, and of ups.
    """

    gated: bool = True
    split: Callable[[Tensor], tuple[Tensor, ...]] = lambda sums: sums.chunk(2, -1)
    function: Callable[..., Tensor] = lambda gate, up: silu(gate) * up


def _pairs(sums: Tensor) -> tuple[Tensor, Tensor]:
    return sums[..., ::2], sums[..., 1::2]


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


ACTIVATIONS = {
    "silu": Activation(),
    "silu, interleaved": Activation(split=_pairs),
    "up first": Activation(function=lambda up, gate: silu(gate) * up),
    "gpt-oss": Activation(split=_pairs, function=gpt_oss),
    "gelu": Activation(function=lambda gate, up: gelu(gate) * up),
    "gelu tanh": Activation(function=lambda gate, up: gelu(gate, approximate="tanh") * up),
    "relu": Activation(function=lambda gate, up: relu(gate) * up),
    "DeepSeek-V4": Activation(function=lambda gate, up: silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)),
    "relu2": Activation(False, lambda sums: (sums,), lambda z: relu(z).square()),
    "silu, no gate": Activation(False, lambda sums: (sums,), silu),
}


@dataclass(frozen=True)
class Shape:
    """Of a mixture: experts, those of a token, hidden size, width, and what it is written with."""

    form: str
    activation: str
    experts: int
    chosen: int
    hidden: int = 64
    width: int = 64
    bias: bool = False
    on_input: bool = False
    dtype: torch.dtype = torch.float32
    quantize: Callable[[Tensor], FP4Weight] = field(default=quantize_nvfp4)

    def __str__(self) -> str:
        ways = [name for name in ("bias", "on_input") if getattr(self, name)]
        sizes = f"{self.chosen} of {self.experts}, {self.hidden} x {self.width}"
        dtype = str(self.dtype).removeprefix("torch.")
        return " / ".join(
            [self.form, self.activation, sizes, self.quantize.__name__.removeprefix("quantize_"), dtype, *ways]
        )


class Experts(nn.Module):
    """One mixture; ``changes`` are what is done where, by the name of the place.

    A change is given the module, the value, and what the pairs are (`At`) where that is known.
    """

    def __init__(self, shape: Shape, special: int = 0) -> None:
        super().__init__()
        self.shape, self.experts, self.special = shape, shape.experts, special
        self.form, self.activation = FORMS[shape.form], ACTIVATIONS[shape.activation]
        rows = shape.width * (2 if self.activation.gated else 1)
        self.gate_up_proj = nn.Parameter(0.3 * torch.randn(shape.experts, rows, shape.hidden).to(shape.dtype), False)
        self.down_proj = nn.Parameter(
            0.3 * torch.randn(shape.experts, shape.hidden, shape.width).to(shape.dtype), False
        )
        self.register_buffer("bias13", torch.randn(shape.experts, rows).to(shape.dtype) if shape.bias else None)
        self.register_buffer("bias2", torch.randn(shape.experts, shape.hidden).to(shape.dtype) if shape.bias else None)
        self.changes: dict[str, Callable[..., Any]] = {}
        hold_fp4(self, shape.quantize)

    def at(self, place: str, value: Any, *more: Any) -> Any:
        """A value, or what becomes of it there."""
        change = self.changes.get(place)
        return value if change is None else change(self, value, *more)

    def expert(self, at: At, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the experts of pairs make of their rows, weighted."""
        on_input, weight = self.shape.on_input, self.at("weight", at.weight, at).unsqueeze(-1)
        x = self.at("rows", at.rows, at)
        sums = multiply(x * weight if on_input else x, self.gate_up_proj)
        if self.bias13 is not None:
            sums = sums + self.at("bias13", self.bias13, at)[at.expert]
        parts = self.activation.split(self.at("sums", sums, at))
        parts = [self.at(place, part, at) for place, part in zip(("gate", "up"), parts, strict=False)]
        y = multiply(self.at("between", self.activation.function(*parts), at), self.down_proj)
        if self.bias2 is not None:
            y = y + self.at("bias2", self.bias2, at)[at.expert]
        y = self.at("down", y, at)
        return self.at("pairs", y if on_input else y * weight, at)

    def total(self, y: Tensor) -> Tensor:
        """The sum over the experts of each token."""
        return self.at("total", y) if "total" in self.changes else y.sum(1)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor | None = None) -> Tensor:
        """Routing weights and ids ``[tokens, choices]``, or the logits that both are chosen from."""
        if ids is None:
            weights, ids = weights.topk(self.shape.chosen)
        pairs = of_pairs(x, weights, ids)
        x, weights, ids = self.at("tokens", x), self.at("route", weights, pairs), self.at("ids", ids, pairs)
        if self.shape.form == "dense":
            scores = torch.zeros(len(x), self.experts, dtype=weights.dtype)
            weights = self.at("scores", scores.scatter(1, ids, weights))
        return self.at("out", self.form(self, x, weights, ids), x)
