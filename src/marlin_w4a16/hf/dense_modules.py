"""Packed modules of a transformers model as dense ones of the model's own classes."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marlin_w4a16.hf.dense import decoded
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_groups import PackedGroups
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.state import PackedState
from marlin_w4a16.modules.transformers_experts import biases_of, is_experts

Packed = PackedLinear | PackedExperts | PackedGroups


def packed_in(model: nn.Module) -> list[tuple[str, Any]]:
    """The packed modules of a model by path, one that stands at several under each."""
    return [(path, m) for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedState)]


def empty_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model of the same class and config, on the meta device."""
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype  # save_pretrained leaves its name there
    with torch.device("meta"):
        twin: PreTrainedModel = type(model)(config)
    return twin


def dense(packed: Packed, like: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module like one of the model that holds no values, with the exact weights rounded once to ``dtype``."""
    made: Any = copy.deepcopy(like)
    names = [name for name, parameter in made._parameters.items() if parameter is not None and parameter.ndim > 1]
    biases: Mapping[str, Tensor | None] = {}
    if isinstance(packed, PackedExperts):
        stacks = [_stacked(weight, dtype) for weight in packed.to_fp4()]
        names = [name for name in names if not name.endswith("_bias")]
        biases = biases_of(packed, made) if is_experts(made) else {}
    elif isinstance(packed, PackedGroups):
        stacks = [_stacked(packed.to_fp4(), dtype)]
    else:
        stacks, biases = [decoded(packed.to_fp4(), dtype)], {"bias": packed.bias}
    for name, weight in zip(names, stacks, strict=True):
        shape = made._parameters[name].shape
        weight = weight.mT if packed.turned else weight
        # columns of an expert's second product may be filled up to whole groups
        cut = weight[..., : shape[-2], : shape[-1]]
        made._parameters[name] = nn.Parameter(cut.contiguous(), made._parameters[name].requires_grad)
    for name, bias in biases.items():
        made._parameters[name] = None if bias is None else nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    return made  # type: ignore[no-any-return]


def _stacked(weight: FP4Weight, dtype: torch.dtype) -> Tensor:
    parts = zip(weight.codes, weight.scales, weight.multiplier, strict=True)
    return torch.stack([decoded(weight.derived(*matrix), dtype) for matrix in parts])
