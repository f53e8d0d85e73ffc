"""Whether a function of sums has the slopes of an activation, where gradients are asked for."""

from collections.abc import Callable

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.passes.outcome import Rejected

_REFERENCES = (0.7, 0.0, -1.3)  # the other sum while one varies
_MOST = 1e4  # slopes at larger sums are rounded
_CLOSE = 1e-4


def other_slope(
    function: Callable[..., Tensor], activation: Activation, gates_first: bool, line: Tensor
) -> Rejected | None:
    """The smallest sums at which a function has another slope than an activation, or None.

    ``clamp(min=0)`` and ``maximum(0)`` are ``relu``, but have other slopes at zero, where the sums of padding are.

    Args:
        function: of sums of any floating type, as it was traced: see `Understood`.
        activation: what it is otherwise.
        gates_first: whether gates are its first argument.
        line: the sums to look at.
    """
    line = line[line.abs() <= _MOST].double()
    if not activation.gated:
        return _difference(function, activation, activation, [line])
    for reference in _REFERENCES:
        other = torch.full_like(line, reference)
        for sums in ([line, other], [other, line]):
            by_name = activation if gates_first else lambda up, gate: activation(gate, up)
            if (found := _difference(function, by_name, activation, sums)) is not None:
                return found
    return None


def _difference(
    function: Callable[..., Tensor], expected: Callable[..., Tensor], activation: Activation, sums: list[Tensor]
) -> Rejected | None:
    (found, wanted) = (_slopes(f, sums) for f in (function, expected))
    wrong = torch.stack([~((a - b).abs() <= _CLOSE * (1 + b.abs())) for a, b in zip(found, wanted, strict=True)])
    if not bool(wrong.any()):
        return None
    size = torch.stack([z.abs() for z in sums]).sum(0).masked_fill(~wrong.any(0), torch.inf)
    at = int(size.argmin())
    given = " and ".join(f"{float(z[at]):g}" for z in sums)
    slopes = (" and ".join(f"{float(s[at]):.4g}" for s in some) for some in (wanted, found))
    told = "expected {}, found {}".format(*slopes)
    return Rejected(f"its gradient is not that of {activation}", f"at sums of {given}: {told}")


def _slopes(function: Callable[..., Tensor], sums: list[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [z.clone().requires_grad_() for z in sums]
        found = function(*leaves)
        return list(torch.autograd.grad(found.sum(), leaves, materialize_grads=True))
