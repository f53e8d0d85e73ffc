"""The experts implementation ``"marlin_w4a16"`` of transformers."""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from marlin_w4a16.modules.packed_experts import PackedExperts

IMPLEMENTATION = "marlin_w4a16"


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation ``"marlin_w4a16"``: runs ``module.packed`` where a module holds that.

    A module whose weights are dense runs as ``grouped_mm`` does, with one warning.

    Args:
        module: an Experts module of transformers.
        hidden_states: ``[tokens, hidden]``.
        top_k_index: ``[tokens, k]``, integers.
        top_k_weights: ``[tokens, k]``.
    """
    packed = module._modules.get("packed")
    if isinstance(packed, PackedExperts):
        out: Tensor = packed(hidden_states, top_k_index, top_k_weights)
    else:
        _warn(type(module).__name__)
        out = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn(name: str) -> None:
    """Warns once, in eager mode or when a graph is traced."""
    _warn_once(name)  # Dynamo would trace through a function that is cached itself


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"experts_implementation={IMPLEMENTATION!r}: the weights of {name} are dense: they run as 'grouped_mm' does",
        stacklevel=3,
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
