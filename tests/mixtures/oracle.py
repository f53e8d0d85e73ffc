"""Random mixtures of FP4 experts, and what they compute, in float64 from the exactly decoded weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.experts import Experts, pack_bias, pack_experts
from marlin_w4a16.kernels.fp4 import FP4Weight

GROUPS = {"nvfp4": ("e4m3", 16), "mxfp4": ("e8m0", 32), "e4m3 group 32": ("e4m3", 32)}
SILU, CLAMPED = Activation(), Activation(gate_limit=1.5, up_limit=1.0)
GPT_OSS, RELU2 = Activation("silu", True, 1.702, 1.5, 1.0, 1.0), Activation("relu2", False)
ACTIVATIONS: dict[str, tuple[Activation, Order | None]] = {
    "Qwen3": (SILU, "gate_up"), "DeepSeek-V4": (CLAMPED, "gate_up"), "gpt-oss": (GPT_OSS, "interleaved"),
    "NemotronH": (RELU2, None), "gelu, up first": (Activation("gelu"), "up_gate"),
    "gelu tanh, interleaved up first": (Activation("gelu_tanh"), "interleaved_up_gate"),
    "relu": (Activation("relu"), "gate_up"), "silu without gates": (Activation("silu", False, gate_limit=1.0), None),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts in canonical form; biases in float64, in the order of the rows."""

    w13: FP4Weight
    w2: FP4Weight
    intermediate: int
    activation: Activation
    order: Order | None
    bias13: Tensor | None = None
    bias2: Tensor | None = None
    weight_on_input: bool = False

    def packed(self, dtype: torch.dtype = torch.float32) -> Experts:
        """As the kernels take it, with biases of a dtype."""
        w13, w2 = pack_experts(self.w13, self.w2, self.order)
        bias13 = None if self.bias13 is None else pack_bias(self.bias13.to(dtype), w2.k, self.order)
        bias2 = None if self.bias2 is None else self.bias2.to(dtype)
        return Experts(w13, w2, self.activation, bias13, bias2, self.weight_on_input)

    def exact(
        self,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None = None,
        between: torch.dtype = torch.float64,
    ) -> Tensor:
        """The result in float64, differentiable; token by token, choice by choice; one dtype between the products."""
        out = [torch.zeros(self.w2.n, dtype=torch.float64) for _ in x]
        dense: dict[int, tuple[Tensor, Tensor]] = {}
        for token, choices in enumerate(topk_ids.tolist()):
            for choice, chosen in enumerate(choices):
                expert = self._local(chosen, expert_map)
                if expert is None:
                    continue
                if expert not in dense:
                    dense[expert] = matrix(self.w13, expert), matrix(self.w2, expert)[:, : self.intermediate]
                weight = topk_weights[token, choice].double()
                out[token] = out[token] + self._expert(x[token].double(), weight, expert, *dense[expert], between)
        return torch.stack(out) if len(x) else torch.zeros(0, self.w2.n, dtype=torch.float64)

    def _local(self, chosen: int, expert_map: Tensor | None) -> int | None:
        if expert_map is not None:
            chosen = int(expert_map[chosen]) if 0 <= chosen < len(expert_map) else -1
        return chosen if 0 <= chosen < len(self.w13.codes) else None

    def _expert(
        self, x: Tensor, weight: Tensor, expert: int, first: Tensor, second: Tensor, between: torch.dtype
    ) -> Tensor:
        sums = first @ (x * weight if self.weight_on_input else x)
        sums = sums if self.bias13 is None else sums + self.bias13[expert]
        y = second @ activated(self.activation, self.order, sums).to(between).double()
        y = y if self.bias2 is None else y + self.bias2[expert]
        return y if self.weight_on_input else y * weight


def activated(activation: Activation, order: Order | None, sums: Tensor) -> Tensor:
    """An activation of sums ``[..., rows]``, written apart from the class."""
    gate, up = {
        None: lambda: (sums, None), "gate_up": lambda: sums.chunk(2, -1), "up_gate": lambda: sums.chunk(2, -1)[::-1],
        "interleaved": lambda: (sums[..., ::2], sums[..., 1::2]),
        "interleaved_up_gate": lambda: (sums[..., 1::2], sums[..., ::2]),
    }[order]()  # fmt: skip
    if activation.gate_limit is not None:
        gate = torch.where(gate > activation.gate_limit, activation.gate_limit, gate)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": lambda z: z / (1 + torch.exp(-activation.alpha * z)),
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
        "relu": lambda z: torch.where(z > 0, z, 0),
        "relu2": lambda z: torch.where(z > 0, z * z, 0),
    }
    value = functions[activation.function](gate)
    if up is None:
        return value
    if activation.up_limit is not None:
        up = torch.where(up.abs() > activation.up_limit, activation.up_limit * up.sign(), up)
    return value * (up + activation.up_offset)


def matrix(weight: FP4Weight, expert: int) -> Tensor:
    """One expert's exact weight in float64."""
    parts = (weight.codes[expert], weight.scales[expert], weight.multiplier[expert])
    return FP4Weight(*parts, weight.kind, weight.group).decode()


def draw_stack(experts: int, n: int, k: int, format: str = "nvfp4") -> FP4Weight:
    """Any codes, any finite scales of either sign (of float16's range if E8M0); rows of length about one."""
    kind, group = GROUPS[format]
    codes = torch.randint(256, (experts, n, k // 2), dtype=torch.uint8)
    shape = (experts, n, k // group)
    if kind == "e8m0":
        scales = torch.randint(118, 132, shape)
    else:
        scales = torch.randint(0x7F, shape) + 0x80 * torch.randint(2, shape)
    weight = FP4Weight(codes, scales.to(torch.uint8), torch.ones(experts, n), kind, group)
    for expert in range(experts):
        length = matrix(weight, expert).norm(dim=-1)
        weight.multiplier[expert] = (0.5 + torch.rand(n)) / length.float().clamp(min=1e-3)
    return weight


def draw_mixture(
    experts: int = 4,
    hidden: int = 64,
    intermediate: int = 96,
    name: str = "Qwen3",
    formats: tuple[str, str] = ("nvfp4", "nvfp4"),
    biases: bool = False,
    **more: Any,
) -> Mixture:
    """A mixture with an activation of `ACTIVATIONS`; its second product has columns in whole groups."""
    activation, order = ACTIVATIONS[name]
    group, rows = GROUPS[formats[1]][1], intermediate * (1 if order is None else 2)
    w13 = draw_stack(experts, rows, hidden, formats[0])
    w2 = draw_stack(experts, hidden, -(-intermediate // group) * group, formats[1])
    if biases:
        more |= {"bias13": torch.randn(experts, rows).double(), "bias2": torch.randn(experts, hidden).double()}
    return Mixture(w13, w2, intermediate, activation, order, **more)


def draw_routing(tokens: int, k: int, experts: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Routing weights and different experts for each token."""
    weights, ids = torch.rand(tokens, experts).topk(min(k, experts))
    return weights.to(dtype), ids
