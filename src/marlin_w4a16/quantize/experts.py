"""The dense Experts module of a mixture quantised; see linear.py for what each function does.

Every expert is rounded by itself, its gates and its ups as a matrix each, so that NVFP4 has a global scale for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.expert_order import kinds
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.transformers_experts import gating_of, names_of, pack_experts_of
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import bytes_of
from marlin_w4a16.quantize.dense import dense_refusal, lost_with, read_outside
from marlin_w4a16.quantize.readers import Readers
from marlin_w4a16.report.table import size

_DECORATED = "transformers.integrations.moe"  # where the forward that use_experts_implementation gives is defined


def refusal(module: Any, readers: Readers, group: int, named: bool) -> str | None:
    """Also for experts that run as no one op, or whose code around them reads a weight."""
    if getattr(type(module).forward, "__globals__", {}).get("__name__") != _DECORATED:
        return f"a {type(module).__name__} has a forward of its own"
    if "forward" in vars(module):
        return "its forward has been replaced"
    weights = names_of(module)
    held = (*weights, *(f"{name}_bias" for name in weights if module.has_bias))
    gate = module._modules.get("act_fn")
    stateless = gate is None or not [*gate.parameters(), *gate.buffers()]
    refused = (
        next(filter(None, (dense_refusal(module, name) for name in held)), None)
        or lost_with(module, (*held, *(["act_fn"] if stateless else [])), "PackedExperts")
        or read_outside(readers, module, held, "which a PackedExperts does not have")
        or shape_refusal(_weights(module), module.has_gate, group, named)
    )
    found = refused or gating_of(module, _weights(module)[0].shape[1])
    return found.reason if isinstance(found, Rejected) else refused


def packed(module: Any, quantise: Callable[..., FP4Weight], group: int) -> PackedExperts:
    """One expert at a time; the columns of the second product are filled up to whole groups with zeros."""
    w13, w2 = _weights(module)
    found = gating_of(module, w13.shape[1])
    if isinstance(found, Rejected):
        raise ValueError(found.reason)
    first, second = (f"its {name}" for name in names_of(module))
    given = (
        stacked(w13, kinds(found[1], w13.shape[1]), quantise, group, first),
        stacked(w2, (slice(None),), quantise, group, second),
    )
    made = pack_experts_of(module, *given, w13.dtype)
    if isinstance(made, Rejected):
        raise ValueError(made.reason)
    made.turned = module.is_transposed
    return made


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """Both as ``[experts, n, k]``, in the memory of the module."""
    w13, w2 = (getattr(module, name).detach() for name in names_of(module))
    return (w13.mT, w2.mT) if module.is_transposed and w13.ndim == w2.ndim == 3 else (w13, w2)


def stacked(
    weight: Tensor, parts: Sequence[slice], quantise: Callable[..., FP4Weight], group: int, name: str
) -> FP4Weight:
    """Each matrix of ``[experts, n, k]`` rounded, its parts by themselves, columns filled up to whole groups."""
    experts, n, k = weight.shape
    width = _filled(k, group)
    codes = torch.empty((experts, n, width // 2), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((experts, n, width // group), dtype=torch.uint8, device=weight.device)
    multiplier = torch.empty((experts, n), dtype=torch.float32, device=weight.device)
    for expert, matrix in enumerate(weight):
        for rows in parts:
            dense = matrix[rows] if width == k else nn.functional.pad(matrix[rows], (0, width - k))
            part = quantise(dense, name=f"{name}, expert {expert}")
            codes[expert, rows], scales[expert, rows] = part.codes, part.scales
            multiplier[expert, rows] = part.multiplier
    return FP4Weight(codes, scales, multiplier, part.kind, group, name)


def _filled(columns: int, group: int) -> int:
    return -(-columns // group) * group


def shape_refusal(weights: tuple[Tensor, Tensor], gated: bool, group: int, named: bool) -> str | None:
    """Why two stacks ``[experts, n, k]`` are not those of experts, or not worth packing; or None."""
    w13, w2 = weights
    shapes = " and ".join(" x ".join(map(str, w.shape)) for w in (w13, w2))
    kinds = 2 if gated else 1
    experts, hidden, intermediate = (*w2.shape, 0, 0, 0)[:3]
    if w2.ndim != 3 or w13.shape != (experts, kinds * intermediate, hidden) or not w13.numel():
        rows = "2 i" if gated else "i"
        return f"its weights are {shapes}, expected [experts, {rows}, hidden] and [experts, hidden, i]"
    if hidden % group:
        return f"its weights are {shapes}, expected a hidden size in groups of {group}"
    if w13.dtype != w2.dtype or w13.device != w2.device:
        return f"its weights are {w13.dtype} on {w13.device} and {w2.dtype} on {w2.device}, expected one of each"
    width, before = _filled(intermediate, group), bytes_of(w13, w2)
    after = experts * (packed_nbytes(kinds * width, hidden, group) + packed_nbytes(hidden, width, group))
    if after >= before and not named:
        return f"its weights are {shapes}, {size(before)}; packed, in whole tiles, they would be {size(after)}"
    return None
