"""One dense linear quantised: what refuses it, and the `PackedLinear` that takes its place.

What `quantize` calls of this file, of experts.py, own_experts.py and groups.py:

    refusal(module, readers, group, named)   why it is left as it is, values apart, or None
    packed(module, quantise, group)          what takes its place; ValueError if the values do not allow that
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.modules.swaps import HOOKS, has_hooks
from marlin_w4a16.producers.found import bytes_of
from marlin_w4a16.quantize.dense import dense_refusal, lost_with, read_outside
from marlin_w4a16.quantize.product import is_product, is_transposed
from marlin_w4a16.quantize.readers import Readers
from marlin_w4a16.report.table import size


def refusal(module: Any, readers: Readers, group: int, named: bool) -> str | None:
    """See above."""
    if "weight" not in module._parameters:
        return dense_refusal(module, "weight")
    if not is_product(module):
        return f"a {type(module).__name__} computes something else than nn.Linear"
    if has_hooks(module):
        return HOOKS.reason
    if "forward" in vars(module):
        return "its forward has been replaced"
    refused = (
        lost_with(module, ("weight", "bias"), "PackedLinear")
        or read_outside(readers, module, ("weight",), "which is empty in a PackedLinear", ("dtype", "device"))
        or dense_refusal(module, "weight")
    )
    if refused is not None:
        return refused
    transposed = is_transposed(module)
    if transposed is None:
        return f"a {type(module).__name__} computes something else than nn.Linear"
    return _shape_refusal(module.weight.mT if transposed else module.weight, group, named)


def packed(module: Any, quantise: Callable[..., FP4Weight], group: int) -> PackedLinear:
    """See above; numbers that the module has of its own, such as its sizes, are kept."""
    weight, turned = module.weight.detach(), bool(is_transposed(module))
    weight = weight.mT.contiguous() if turned else weight
    made = PackedLinear(quantise(weight, name="its weight"), module.bias, weight.dtype)
    made.turned = turned
    for name, value in vars(module).items():
        if isinstance(value, int | float | str) and not hasattr(made, name):
            setattr(made, name, value)
    return made


def _shape_refusal(weight: Tensor, group: int, named: bool) -> str | None:
    if weight.ndim != 2 or weight.shape[1] % group or not weight.numel():
        return f"its weight is {' x '.join(map(str, weight.shape))}, expected columns in groups of {group}"
    n, k = weight.shape
    before, after = bytes_of(weight), packed_nbytes(n, k, group)
    if after >= before and not named:
        return f"its weight is {n} x {k}, {size(before)}; packed, in whole tiles, it would be {size(after)}"
    return None
