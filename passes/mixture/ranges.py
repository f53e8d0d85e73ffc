"""Whether a function of sums stays in the range of the type it is computed in where an activation does."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.passes.mixture.activation import LARGEST
from marlin_w4a16.passes.outcome import Rejected

_POINTS = 33  # magnitudes, as powers of two up to the largest that is finite, or on the grid of activations
_SMALLEST = -8
_NEAR = 0.25  # what rounding may move out of the range


def out_of_range(
    function: Callable[..., Tensor], activation: Activation, gates_first: bool, dtype: torch.dtype
) -> Rejected | None:
    """The smallest sums at which a function is Inf or NaN and the activation, computed exactly, well within the range.

    A cube of a gate is infinite in float16 from 41 on, even where what is made of it is small again.

    Args:
        function: of sums of any floating type, as it was traced: see `Understood`.
        activation: what it is otherwise.
        gates_first: whether gates are its first argument.
        dtype: what it is computed in.
    """
    most = torch.finfo(dtype).max
    largest = min(most, LARGEST)
    powers = torch.logspace(_SMALLEST, math.log2(largest), _POINTS, base=2.0, dtype=torch.float64).clamp(max=largest)
    line = torch.cat((-powers, torch.zeros(1), powers)).to(dtype)
    sums = [grid.flatten() for grid in torch.meshgrid(line, line, indexing="ij")] if activation.gated else [line]
    expected = activation(*(z.double() for z in (sums if gates_first else sums[::-1])))
    with torch.no_grad():
        found = function(*sums)
    left = (expected.abs() <= _NEAR * most) & ~found.isfinite()
    if not left.any():
        return None
    at = int(sum(z.double().abs() for z in sums).masked_fill(~left, torch.inf).argmin())  # type: ignore[union-attr]
    given = " and ".join(f"{float(z[at]):g}" for z in sums)
    told = f"in {str(dtype).removeprefix('torch.')} it is {float(found[at]):g} at sums of {given}"
    return Rejected("what stands between the two products leaves its range", f"{told}, {activation} is not")
