"""Experts of transformers as `PackedExperts`, and the experts implementation ``"marlin_w4a16"``.

Most mixtures of transformers keep their experts in one module of stacked weights, whose class is decorated by
``use_experts_implementation`` (transformers/integrations/moe.py); what the decorator leaves on the module says how it
is read here.
"""

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.packed_experts import PackedExperts
from marlin_w4a16.passes.gating import recognise_activation
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.swaps import has_hooks

IMPLEMENTATION = "marlin_w4a16"
_QUICK_GELU = 1.702  # which stands in the code of quick_gelu
_LARGEST = 1000  # integers of a module or config beyond it are sizes, no limits


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


def pack_experts_of(
    module: Any, w13: FP4Weight, w2: FP4Weight, dtype: torch.dtype = torch.bfloat16
) -> PackedExperts | Rejected:
    """What can stand in the place of an Experts module of transformers, or be its ``packed``.

    Activation and order are derived by running the module's own gate; biases are the module's.

    Args:
        module: has the attributes of ``use_experts_implementation``; its weights need not hold values.
        w13: what its ``gate_up_proj`` or ``up_proj`` would be, ``[experts, rows, hidden]`` even where the module holds
            it transposed.
        w2: what its ``down_proj`` would be, ``[experts, hidden, intermediate]``.
        dtype: see `PackedExperts`.

    Returns:
        The experts, or why they cannot run as one op.
    """
    refusal = _refusal(module, w13, w2)
    if refusal is not None:
        return refusal
    gate = module._apply_gate if module.has_gate else module.act_fn
    found = recognise_activation(gate, w13.n, _numbers(module), _device(module))
    if isinstance(found, Rejected):
        return found
    activation, order = found
    if activation.gated != module.has_gate:
        return Rejected(f"it computes {activation} but says has_gate={module.has_gate}")
    bias13, bias2 = (getattr(module, f"{name}_bias") if module.has_bias else None for name in _names(module))
    try:
        return PackedExperts(w13, w2, activation, order, bias13, bias2, dtype).train(module.training)
    except ValueError as error:
        return Rejected(str(error))


def _refusal(module: Any, w13: FP4Weight, w2: FP4Weight) -> Rejected | None:
    lacks = [name for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate") if not hasattr(module, name)]
    if lacks:
        return Rejected(f"a {type(module).__name__} is no Experts module of transformers: it has no {lacks[0]}")
    if getattr(module, "has_post_expert_norm", False):
        return Rejected("it normalises what each expert gives (has_post_expert_norm)")
    if has_hooks(module):
        return Rejected("it has hooks, which a PackedExperts would lose")
    for name, weight in zip(_names(module), (w13, w2), strict=True):
        dense = module._parameters.get(name)
        if dense is None:
            continue
        shape, found = (*weight.codes.shape[:-1], weight.k), tuple(dense.shape)
        found = (*found[:-2], found[-1], found[-2]) if module.is_transposed else found
        # the columns of the second product may be filled up to whole groups
        if (shape[:-1], -(-found[-1] // weight.group) * weight.group) != (found[:-1], shape[-1]):
            return Rejected(f"{name}: found FP4 of shape {list(shape)}, expected {list(found)}")
    return None


def _names(module: Any) -> tuple[str, str]:
    """The names of its first and second weight."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _numbers(module: Any) -> tuple[float, ...]:
    """What may be alpha, a limit or an offset: the module's numbers first."""
    holders = (vars(module), vars(getattr(module, "act_fn", None) or nn.Identity()), vars(module.config))
    return (*dict.fromkeys(number for holder in holders for number in _small(holder)), _QUICK_GELU)


def _small(values: dict[str, Any]) -> Iterator[float]:
    for value in values.values():
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST:
            yield float(value)


def _device(module: nn.Module) -> torch.device:
    held = next((t.device for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"), None)
    return torch.device("cpu") if held is None else held


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
