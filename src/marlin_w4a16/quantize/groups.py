"""Stacks of linears that each take some of the rows (JetMoe), quantised; see linear.py for what each function does."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.modules.packed_groups import PackedGroups
from marlin_w4a16.modules.swaps import has_hooks
from marlin_w4a16.producers.found import bytes_of
from marlin_w4a16.quantize.dense import dense_refusal, is_near, lost_with, read_outside
from marlin_w4a16.quantize.experts import stacked
from marlin_w4a16.quantize.readers import Readers
from marlin_w4a16.report.table import size


def is_groups(module: nn.Module) -> bool:
    """Whether a module may be one: it takes rows and their numbers, and owns a stack."""
    held = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    if list(held) != ["weight"] or held["weight"].ndim != 3 or isinstance(module, nn.modules.conv._ConvNd):
        return False
    try:
        return len(inspect.signature(type(module).forward).parameters) == 3
    except (TypeError, ValueError):
        return False


def refusal(module: Any, readers: Readers, group: int, named: bool) -> str | None:
    """See linear.py."""
    if has_hooks(module):
        return "it has hooks, which a PackedGroups would lose"
    if "forward" in vars(module):
        return "its forward has been replaced"
    refused = (
        dense_refusal(module, "weight")
        or lost_with(module, ("weight",), "PackedGroups")
        or read_outside(readers, module, ("weight",), "which is empty in a PackedGroups", ("dtype", "device"))
    )
    weight = module.weight
    if refused is not None:
        return refused
    if not _multiplies(module, weight.detach()):
        return f"a {type(module).__name__} has a forward of its own, which is not that of a linear for each expert"
    experts, n, k = weight.shape
    if k % group:
        return f"its weight is {experts} x {n} x {k}, expected columns in groups of {group}"
    before, after = bytes_of(weight), experts * packed_nbytes(n, k, group)
    if after >= before and not named:
        shape = f"its weight is {experts} x {n} x {k}, {size(before)}"
        return f"{shape}; packed, in whole tiles, it would be {size(after)}"
    return None


def packed(module: Any, quantise: Callable[..., FP4Weight], group: int) -> PackedGroups:
    """See linear.py; each matrix is rounded by itself."""
    weight = module.weight.detach()
    return PackedGroups(stacked(weight, (slice(None),), quantise, group, "its weight"), weight.dtype)


def _multiplies(module: Any, weight: Tensor) -> bool:
    """Whether a module gives for some rows what a linear for each expert gives; one expert has none."""
    counts = [(expert + 2) % 3 for expert in range(len(weight))]
    x = torch.randn((sum(counts), weight.shape[2]), generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            parts = [
                nn.functional.linear(rows, matrix) for rows, matrix in zip(torch.split(x, counts), weight, strict=True)
            ]
            return is_near(module.forward(x, counts), torch.cat(parts))
    except Exception:  # whatever a module's own code raises
        return False
