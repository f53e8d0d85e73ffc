"""A mixture of experts in plain PyTorch, in parts that tests exchange one by one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from marlin_w4a16 import FP4Weight, quantize_nvfp4
from mixtures.experts import hold_fp4

T, H, WIDTH, E, K = 7, 64, 96, 5, 2


def halves(sums: Tensor) -> Tensor:
    gate, up = sums.chunk(2, -1)
    return silu(gate) * up


def interleaved(sums: Tensor) -> Tensor:
    """gpt-oss's."""
    gate, up = sums[..., ::2], sums[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


def grouped(m: "Mixture", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorted by expert, as transformers' ``grouped_mm``; the products are a loop that Dynamo does not look into."""
    k = ids.shape[1]
    chosen, perm = torch.sort(ids.reshape(-1))
    rows, weight = x[perm // k], weights.reshape(-1)[perm].unsqueeze(-1)
    offsets = torch.cumsum(
        torch.histc(chosen.float(), bins=m.experts, min=0, max=m.experts - 1), dim=0, dtype=torch.int32
    )
    y = m.expert(rows, weight, chosen, lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w.mT, offsets))
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return m.total(y[inverse].view(len(x), k, -1))


def native(m: "Mixture", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorted by expert, by torch's own grouped product, which wants bfloat16."""
    k = ids.shape[1]
    chosen, perm = torch.sort(ids.reshape(-1))
    rows, weight = x[perm // k], weights.reshape(-1)[perm].unsqueeze(-1)
    counts = torch.histc(
        chosen.float() if x.device.type == "cpu" else chosen.int(), bins=m.experts, min=0, max=m.experts - 1
    )
    offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
    y = m.expert(rows, weight, chosen, lambda x, w: torch.nn.functional.grouped_mm(x, w.mT, offs=offsets))
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0), device=perm.device)
    return m.total(y[inverse].view(len(x), k, -1))


def added(m: "Mixture", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The same, summed by ``index_add_`` into zeros."""
    k = ids.shape[1]
    chosen, perm = torch.sort(ids.reshape(-1))
    rows, weight = x[perm // k], weights.reshape(-1)[perm].unsqueeze(-1)
    offsets = torch.cumsum(
        torch.histc(chosen.float(), bins=m.experts, min=0, max=m.experts - 1), dim=0, dtype=torch.int32
    )
    y = m.expert(rows, weight, chosen, lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w.mT, offsets))
    out = torch.zeros_like(x)
    out.index_add_(0, perm // k, y)
    return out


def batched(m: "Mixture", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A matrix for each row, as transformers' ``batched_mm``."""
    k, chosen = ids.shape[1], ids.reshape(-1)
    rows, weight = x.repeat_interleave(k, dim=0), weights.reshape(-1, 1)
    y = m.expert(rows, weight, chosen, lambda x, w: torch.bmm(w[chosen], x.unsqueeze(-1)).squeeze(-1))
    return m.total(y.view(len(x), k, -1))


def einsum(m: "Mixture", x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A matrix for each token and expert of it."""
    rows = x.unsqueeze(1).expand(-1, ids.shape[1], -1)
    y = m.expert(rows, weights.unsqueeze(-1), ids, lambda x, w: torch.einsum("tek,tenk->ten", x, w[ids]))
    return m.total(y)


FORMS = {form.__name__: form for form in (grouped, added, batched, einsum)}


@dataclass(frozen=True)
class Parts:
    """What a mixture is made of.

    Attributes:
        form: how rows are brought to experts and back.
        activation: between the products.
        gated: whether it halves the rows.
        bias: biases after both products.
        on_input: the routing weights multiply the input of an expert.
        total: the sum over the experts of a token.
        route: what is done to the routing weights inside the mixture.
        after: what is done to the second product, before its routing weight.
    """

    form: Callable[..., Tensor] = grouped
    activation: Callable[[Tensor], Tensor] = halves
    gated: bool = True
    bias: bool = False
    on_input: bool = False
    total: Callable[[Tensor], Tensor] = field(default=lambda y: y.sum(1))
    route: Callable[[Tensor], Tensor] = field(default=lambda w: w)
    after: Callable[[Tensor], Tensor] = field(default=lambda y: y)


class Mixture(nn.Module):
    """Experts that hold FP4."""

    def __init__(
        self,
        parts: Parts,
        quantize: Callable[[Tensor], FP4Weight] = quantize_nvfp4,
        dtype: torch.dtype = torch.float32,
        scale: float = 0.3,
        experts: int = E,
    ) -> None:
        super().__init__()
        self.parts, self.experts = parts, experts
        rows = 2 * WIDTH if parts.gated else WIDTH
        self.gate_up_proj = nn.Parameter(scale * torch.randn(experts, rows, H).to(dtype), requires_grad=False)
        self.down_proj = nn.Parameter(scale * torch.randn(experts, H, WIDTH).to(dtype), requires_grad=False)
        if parts.bias:
            self.bias13 = nn.Parameter(torch.randn(experts, rows).to(dtype), requires_grad=False)
            self.bias2 = nn.Parameter(torch.randn(experts, H).to(dtype), requires_grad=False)
        hold_fp4(self, quantize)

    def expert(self, x: Tensor, weight: Tensor, chosen: Tensor, multiply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the chosen experts make of rows."""
        parts, weight = self.parts, self.parts.route(weight)
        x = x * weight if parts.on_input else x
        sums = multiply(x, self.gate_up_proj)
        if parts.bias:
            sums.add_(self.bias13[chosen])
        y = multiply(parts.activation(sums), self.down_proj)
        if parts.bias:
            y = y + self.bias2[chosen]
        y = parts.after(y)
        return y if parts.on_input else y * weight

    def total(self, y: Tensor) -> Tensor:
        """The sum over the experts of each token."""
        return self.parts.total(y)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.parts.form(self, x, weights, ids)


def inputs(
    tokens: int = T, dtype: torch.dtype = torch.float32, scale: float = 3.0, experts: int = E
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, routing weights and experts."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :K]
    return scale * torch.randn(tokens, H).to(dtype), torch.rand(tokens, K).to(dtype) + 0.1, ids
