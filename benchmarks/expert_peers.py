"""Mixtures of FP4 experts to time side by side: ours, transformers' grouped_mm, the same compiled, Humming.

A peer turns the experts of one mixture into a `Ready` call over enough copies of them that no cache holds those that
are touched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from expert_models import Mixture, Routing, Weights, decoded
from peers import FORMATS, clones, humming_config, not_importable, scales_of
from timing import copies_for
from torch import Tensor, nn

from marlin_w4a16.kernels.experts import Experts, pack_bias, pack_experts
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.moe import moe


@dataclass(frozen=True)
class Ready:
    """``call(i, x, routing)`` with copy ``i`` of ``copies``; ``nbytes`` are those of one copy's weights."""

    call: Callable[[int, Tensor, Routing], Tensor]
    copies: int
    nbytes: int


class Peer(Protocol):
    """What is timed. ``missing`` says why it cannot run here, or None."""

    name: str

    def missing(self) -> str | None: ...

    def prepare(self, weights: Weights, routings: Sequence[Routing]) -> Ready:
        """Copies enough for the routing that touches the fewest experts."""


class Ours:
    name = "ours"

    def missing(self) -> str | None:
        return None

    def prepare(self, weights: Weights, routings: Sequence[Routing]) -> Ready:
        m = weights.mixture
        w13, w2 = pack_experts(weights.w13, weights.w2, m.order)
        bias13 = None if weights.bias13 is None else pack_bias(weights.bias13, w2.k, m.order)
        nbytes = w13.nbytes + w2.nbytes
        count = copies_needed(nbytes, m, routings)
        copies = [[replace(w, **copy) for copy in clones(tensors_of(w), count)] for w in (w13, w2)]
        experts = [Experts(*pair, m.activation, bias13, weights.bias2) for pair in zip(*copies, strict=True)]
        return Ready(lambda i, x, r: moe(x, experts[i], r.weights, r.ids, None), len(experts), nbytes)


class GroupedMM:
    """The experts of transformers, ``experts_implementation="grouped_mm"``, with dense weights."""

    name = "grouped_mm"

    def missing(self) -> str | None:
        return None if hasattr(nn.functional, "grouped_mm") else f"torch {torch.__version__} has no grouped_mm"

    def prepare(self, weights: Weights, routings: Sequence[Routing]) -> Ready:
        m, dtype = weights.mixture, weights.dtype
        dense = {"w13": decoded(weights.w13, dtype), "w2": decoded(weights.w2, dtype)}
        nbytes = sum(t.nbytes for t in dense.values())
        copies = clones(dense, copies_needed(nbytes, m, routings))
        biases = {"bias13": weights.bias13, "bias2": weights.bias2}
        return Ready(lambda i, x, r: self.run(x)(x, r, m, **copies[i], **biases), len(copies), nbytes)

    def run(self, x: Tensor) -> Callable[..., Tensor]:
        return by_grouped_mm


class Compiled(GroupedMM):
    """The same under ``torch.compile``."""

    name = "compiled"

    def __init__(self) -> None:
        self.function, self.tokens = by_grouped_mm, -1

    def run(self, x: Tensor) -> Callable[..., Tensor]:
        if len(x) != self.tokens:  # without the reset, Dynamo stops compiling after eight shapes
            torch._dynamo.reset()
            self.function, self.tokens = torch.compile(by_grouped_mm, dynamic=False), len(x)
        return self.function


class Humming:
    """The two products of the package humming-kernels, the activation and the weighted sum under ``torch.compile``.

    The package aligns no tokens, so that is not in its time.
    """

    name = "humming"

    def missing(self) -> str | None:
        return not_importable("humming")

    def prepare(self, weights: Weights, routings: Sequence[Routing]) -> Ready:
        m = weights.mixture
        products = [
            HummingProduct(weights, routings, *pair)
            for pair in ((weights.w13, weights.bias13), (weights.w2, weights.bias2))
        ]
        nbytes = sum(product.nbytes for product in products)
        first, second = (clones(p.tensors, copies_needed(nbytes, m, routings)) for p in products)
        between, add = (torch.compile(f, dynamic=True) for f in (m.between, weighted_sum))

        def call(i: int, x: Tensor, routing: Routing) -> Tensor:
            hidden = between(products[0].call(x, routing, m.k, first[i]))
            return add(products[1].call(hidden, routing, 1, second[i]), routing.weights)

        return Ready(call, len(first), nbytes)


class HummingProduct:
    """One of the products: its kernel and its table of tokens for each routing."""

    def __init__(self, weights: Weights, routings: Sequence[Routing], weight: FP4Weight, bias: Tensor | None) -> None:
        from humming.config import ComputeConfig
        from humming.kernel.humming import HummingKernel
        from humming.transform import prepare_fp16_e8m0_scale, transform_humming_tensors
        from humming.tune import get_heuristics_config

        name = next(name for name, (kind, _) in FORMATS.items() if kind == weight.kind)
        tensors = {"weight": weight.codes.view(torch.int32), "weight_scale": scales_of(weight)}
        if weight.kind == "e4m3":
            tensors["weight_scale_2"] = weight.multiplier[:, 0].contiguous()
        if bias is not None:
            tensors["bias"] = bias
        more = {"num_experts": len(weight.codes), "has_bias": bias is not None}
        config = humming_config(weight.n, weight.k, name, weights.dtype, **more)
        config, tensors = prepare_fp16_e8m0_scale(config, tensors)
        self.n, self.tensors = weight.n, transform_humming_tensors(config, tensors)
        self.nbytes = sum(t.nbytes for t in self.tensors.values())
        self.tensors["locks"] = torch.zeros(2048, dtype=torch.int32, device=weight.codes.device)
        found = [get_heuristics_config(config, shape_m=r.ids.numel(), gemm_type="indexed") for r in routings]
        kernels = HummingKernel.prepare_kernels(
            config.to_str(), ComputeConfig(gemm_type="indexed").to_str(), [(0, 1 << 30, values) for values in found]
        ).reshape(-1, 4)
        self.of = {
            routing: (kernel, aligned(routing.ids, values["block_shape"][0]))
            for routing, kernel, values in zip(routings, kernels, found, strict=True)
        }

    def call(self, x: Tensor, routing: Routing, k: int, tensors: dict[str, Any]) -> Tensor:
        from humming.ops.launcher import launch_kernel

        kernel, table = self.of[routing]
        out = x.new_empty(routing.ids.numel(), self.n)
        launch_kernel(configs=kernel, inputs=x, outputs=out, top_k=k, **table, **tensors)
        return out


def aligned(ids: Tensor, block: int) -> dict[str, Tensor]:
    """Blocks of pairs of one expert as vLLM's ``moe_align_block_size`` makes them."""
    chosen, flat = ids.unique().tolist(), ids.flatten()
    pairs = [(flat == expert).nonzero()[:, 0] for expert in chosen]
    padded = [nn.functional.pad(part, (0, -len(part) % block), value=ids.numel()) for part in pairs]
    of = [expert for expert, part in zip(chosen, padded, strict=True) for _ in range(len(part) // block)]
    places = torch.cat(padded).int()
    return {
        "sorted_ids": places,
        "expert_ids": torch.tensor(of, dtype=torch.int32, device=ids.device),
        "num_tokens_padded": torch.tensor([len(places)], dtype=torch.int32, device=ids.device),
    }


def weighted_sum(y: Tensor, weights: Tensor) -> Tensor:
    return (y.view(*weights.shape, -1).float() * weights.float().unsqueeze(-1)).sum(1).to(y.dtype)


def by_grouped_mm(
    x: Tensor, routing: Routing, mixture: Mixture, w13: Tensor, w2: Tensor, bias13: Tensor | None, bias2: Tensor | None
) -> Tensor:
    """Rows sorted by expert, two grouped products, rows put back and added up: no synchronisation."""
    tokens, k = routing.ids.shape
    of_row, order = torch.sort(routing.ids.reshape(-1))
    counts = torch.histc(of_row.float(), bins=len(w13), min=0, max=len(w13) - 1)
    ends = torch.cumsum(counts, 0, dtype=torch.int32)
    sums = nn.functional.grouped_mm(x[order // k], w13.mT, offs=ends)
    sums = sums if bias13 is None else sums + bias13[of_row]
    y = nn.functional.grouped_mm(mixture.between(sums), w2.mT, offs=ends)
    y = y if bias2 is None else y + bias2[of_row]
    y = y * routing.weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(tokens, k, -1).sum(1).to(x.dtype)


def tensors_of(packed: PackedFP4) -> dict[str, Tensor]:
    return {"words": packed.words, "scales": packed.scales, "multiplier": packed.multiplier}


def copies_needed(nbytes: int, mixture: Mixture, routings: Sequence[Routing]) -> int:
    """How many copies of all experts leave no cache warm for calls that touch some of them."""
    fewest = min(routing.touched for routing in routings)
    return copies_for(max(1, nbytes * fewest // mixture.experts))


PEERS: tuple[type[Peer], ...] = (Ours, GroupedMM, Compiled, Humming)
