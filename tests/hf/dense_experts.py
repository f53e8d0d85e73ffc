"""Experts of a checkpoint as the plain model holds them: stacked, gate before up, and as gpt-oss has them."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)$")
STACKED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)_(blocks|scales|bias)$")
LEAVES = {"blocks": "weight", "scales": "weight_scale"}
TRANSPOSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(?:_(weight_scale_2|weight_scale|input_scale))?$")
ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def is_expert(path: str) -> bool:
    """Whether a linear of this path is one of an expert."""
    return EXPERT.fullmatch(path) is not None


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With codes and scales of gpt-oss as if each expert had linears of its own, gate and up still interleaved.

    ModelOpt leaves them as transformers has the weights: columns before rows.
    """
    found = {}
    for name, tensor in tensors.items():
        match, other = STACKED.fullmatch(name), TRANSPOSED.fullmatch(name)
        if other is not None and f"{other[1]}.{other[2]}_weight_scale" in tensors:
            for i in range(len(tensors[f"{other[1]}.{other[2]}"])):
                part = tensor[i].T.contiguous() if tensor.ndim == 3 else tensor
                found[f"{other[1]}.{i}.{other[2]}.{other[3] or 'weight'}"] = part
            continue
        if match is None or match[3] == "bias":
            found[name] = tensor
            continue
        for i, part in enumerate(tensor):
            found[f"{match[1]}.{i}.{match[2]}.{LEAVES[match[3]]}"] = part.flatten(1) if match[3] == "blocks" else part
    return found


def fused(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """The parameters of Experts modules, of the weights of each expert's linears by their paths."""
    experts: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for path, weight in weights.items():
        module, number, projection = EXPERT.fullmatch(path).groups()
        experts[module][int(number)][ROLES.get(projection, projection)] = weight
    found = {}
    for module, parts in experts.items():
        merged = [merge(parts[number]) for number in range(len(parts))]
        found |= {f"{module}.{name}": torch.stack([one[name] for one in merged]) for name in merged[0]}
    return {name: stack.transpose(1, 2) for name, stack in found.items()} if model_type == "gpt_oss" else found


def merge(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """One expert: the rows of its gate before those of its up projection, where it has a gate."""
    if "gate_proj" in parts:
        return {"gate_up_proj": torch.cat([parts["gate_proj"], parts["up_proj"]]), "down_proj": parts["down_proj"]}
    return parts
