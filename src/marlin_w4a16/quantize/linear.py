"""One dense linear quantised: what refuses it, and the `PackedLinear` that takes its place.

What `quantize` calls of this file and of experts.py:

    refusal(module, places, group, named)    why it is left as it is, values apart, or None
    packed(module, quantise, group)          what takes its place; ValueError if the values do not allow that
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.swaps import HOOKS, Places, has_hooks
from marlin_w4a16.producers.found import bytes_of, is_linear
from marlin_w4a16.quantize.dense import dense_refusal, lost_with, read_outside
from marlin_w4a16.report.table import size


def refusal(module: Any, places: Places, group: int, named: bool) -> str | None:
    """See above."""
    if not is_linear(type(module)):
        return f"a {type(module).__name__} computes something else than nn.Linear"
    if "weight" not in module._parameters:
        return dense_refusal(module, "weight")
    if has_hooks(module):
        return HOOKS.reason
    if "forward" in vars(module):
        return "its forward has been replaced"
    return (
        lost_with(module, ("weight", "bias"), "PackedLinear")
        or read_outside(places, ("weight",), "which is empty in a PackedLinear", ("dtype", "device"))
        or dense_refusal(module, "weight")
        or _shape_refusal(module.weight, group, named)
    )


def packed(module: Any, quantise: Callable[..., FP4Weight], group: int) -> PackedLinear:
    """See above."""
    weight = module.weight
    return PackedLinear(quantise(weight, name="its weight"), module.bias, weight.dtype)


def _shape_refusal(weight: nn.Parameter, group: int, named: bool) -> str | None:
    if weight.ndim != 2 or weight.shape[1] % group or not weight.numel():
        return f"its weight is {' x '.join(map(str, weight.shape))}, expected columns in groups of {group}"
    n, k = weight.shape
    before, after = bytes_of(weight), packed_nbytes(n, k, group)
    if after >= before and not named:
        return f"its weight is {n} x {k}, {size(before)}; packed, in whole tiles, it would be {size(after)}"
    return None
