"""Experts of transformers' own classes, with tokens, routing weights, ids and results that can be changed."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import activations  # noqa: F401, imported before a graph is traced

from attacks.experts import Shape, of_pairs
from mixtures.experts import hold_fp4
from mixtures.models import COMMON, Family
from mixtures.models import FAMILIES as ALL

FAMILIES = [family for family in ALL if family.name in ("Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3", "Glm4Moe")]
SIZES = {"Qwen3Moe": (6, 48), "Mixtral": (4, 96), "GptOss": (4, 96), "DeepseekV3": (8, 48), "Glm4Moe": (8, 48)}


class Real(nn.Module):
    """The experts of one layer of a family."""

    def __init__(self, family: Family, implementation: str | None) -> None:
        super().__init__()
        config = getattr(transformers, f"{family.name}{family.config}")(**COMMON | family.settings)
        config._experts_implementation = implementation
        self.inner = _experts(family)(config)
        for name, parameter in self.inner.named_parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape) * (1.0 if "bias" in name else 0.3))
        hold_fp4(self.inner, family.quantize, transposed=family.transposed)
        count, width = SIZES[family.name]
        self.experts, self.special = count, 0
        self.shape = Shape(
            f"{family.name} {implementation}", family.activation, count, 2, 64, width, quantize=family.quantize
        )
        self.changes: dict[str, Any] = {}

    def at(self, place: str, value: Any, *more: Any) -> Any:
        """A value, or what becomes of it there."""
        change = self.changes.get(place)
        return value if change is None else change(self, value, *more)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        pairs = of_pairs(x, weights, ids)
        x, weights, ids = self.at("tokens", x), self.at("route", weights, pairs), self.at("ids", ids, pairs)
        return self.at("out", self.inner(x, ids, weights), x)


def _experts(family: Family) -> type[nn.Module]:
    config = getattr(transformers, f"{family.name}{family.config}")
    module = __import__(config.__module__.replace("configuration", "modeling"), fromlist=[family.experts])
    return getattr(module, family.experts)
