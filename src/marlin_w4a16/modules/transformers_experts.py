"""What an Experts module of transformers computes, read off the module; transformers itself is not needed.

Most mixtures of transformers keep their experts in one module of stacked weights, whose class is decorated by
``use_experts_implementation`` (transformers/integrations/moe.py); what the decorator leaves on the module says how it
is read here.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.experts import unpack_bias
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.gates import recognise_gate
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.swaps import has_hooks
from marlin_w4a16.passes.outcome import Rejected

_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "_apply_gate")
_QUICK_GELU = 1.702  # which stands in the code of quick_gelu
_LARGEST = 1000  # integers of a module or config beyond it are sizes, no limits


def is_experts(module: nn.Module) -> bool:
    """Whether a module has what ``use_experts_implementation`` leaves on one."""
    return all(hasattr(module, name) for name in _ATTRIBUTES)


def holds_packed(module: nn.Module) -> bool:
    """Whether a module holds packed experts, as the experts implementation ``"marlin_w4a16"`` runs them."""
    return any(isinstance(child, PackedExperts) for child in module.children())


def names_of(module: Any) -> tuple[str, str]:
    """The names of its first and second weight; those of their biases end in ``_bias``."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def biases_of(packed: PackedExperts, module: Any) -> dict[str, nn.Parameter]:
    """The biases of packed experts by their names in an Experts module, and in its order."""
    first, second = (f"{name}_bias" for name in names_of(module))
    found = {first: packed.bias13, second: packed.bias2}
    if packed.bias13 is not None:
        bias = unpack_bias(packed.bias13.detach(), packed.intermediate, packed.order)
        found[first] = nn.Parameter(bias, packed.bias13.requires_grad)
    return {name: bias for name, bias in found.items() if bias is not None}


def gating_of(module: Any, rows: int) -> tuple[Activation, Order | None] | Rejected:
    """The activation of an Experts module and the order of its rows, derived by running its own gate.

    Args:
        module: its weights need not hold values.
        rows: of its first product.

    Returns:
        Activation and order (None without gates), or why the module cannot run as one op, whatever its weights are.
    """
    return _refusal(module) or _gating(module, rows)


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
    found = _refusal(module) or _shape_refusal(module, w13, w2) or _gating(module, w13.n)
    if isinstance(found, Rejected):
        return found
    bias13, bias2 = (getattr(module, f"{name}_bias") if module.has_bias else None for name in names_of(module))
    try:
        return PackedExperts(w13, w2, *found, bias13, bias2, dtype).train(module.training)
    except ValueError as error:
        return Rejected(str(error))


def _refusal(module: Any) -> Rejected | None:
    lacks = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if lacks:
        return Rejected(f"a {type(module).__name__} is no Experts module of transformers: it has no {lacks[0]}")
    if getattr(module, "has_post_expert_norm", False):
        return Rejected("it normalises what each expert gives (has_post_expert_norm)")
    if has_hooks(module):
        return Rejected("it has hooks, which a PackedExperts would lose")
    return None


def _shape_refusal(module: Any, w13: FP4Weight, w2: FP4Weight) -> Rejected | None:
    for name, weight in zip(names_of(module), (w13, w2), strict=True):
        dense = module._parameters.get(name)
        if dense is None:
            continue
        shape, found = (*weight.codes.shape[:-1], weight.k), tuple(dense.shape)
        found = (*found[:-2], found[-1], found[-2]) if module.is_transposed else found
        # the columns of the second product may be filled up to whole groups
        if (shape[:-1], -(-found[-1] // weight.group) * weight.group) != (found[:-1], shape[-1]):
            return Rejected(f"{name}: found FP4 of shape {list(shape)}, expected {list(found)}")
    return None


def _gating(module: Any, rows: int) -> tuple[Activation, Order | None] | Rejected:
    gate = module._apply_gate if module.has_gate else module.act_fn
    found = recognise_gate(gate, rows, _numbers(module), _device(module))
    if not isinstance(found, Rejected) and found[0].gated != module.has_gate:
        return Rejected(f"it computes {found[0]} but says has_gate={module.has_gate}")
    return found


def _numbers(module: Any) -> tuple[float, ...]:
    """What may be alpha, a limit or an offset: the module's numbers first."""
    holders = (vars(module), vars(getattr(module, "act_fn", None) or nn.Identity()), vars(module.config))
    return (*dict.fromkeys(number for holder in holders for number in _small(holder)), _QUICK_GELU)


def _small(values: dict[str, Any]) -> Iterator[float]:
    for value in values.values():
        is_size = isinstance(value, int) and abs(value) > _LARGEST
        if isinstance(value, int | float) and not isinstance(value, bool) and not is_size:
            yield float(value)


def _device(module: nn.Module) -> torch.device:
    tensors = (*module.parameters(), *module.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))
