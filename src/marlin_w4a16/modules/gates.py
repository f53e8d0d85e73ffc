"""The activation of experts, told by running what a module computes between its products on data."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order, kinds
from marlin_w4a16.passes.mixture.activation import NONE, recognise_activation
from marlin_w4a16.passes.outcome import Rejected

# Which is the gate, the first or the second column of a pair, where pairs lie in halves or side by side.
_LAYOUTS = ((Order.GATE_UP, Order.UP_GATE), (Order.INTERLEAVED, Order.INTERLEAVED_UP_GATE))
_Run = Callable[[Tensor], Tensor]


class _NoFunction(ValueError):
    """What was run is no function of pairs of sums."""


def recognise_gate(
    function: Callable[[Tensor], Tensor], rows: int, numbers: Sequence[float], device: torch.device | str = "cpu"
) -> tuple[Activation, Order | None] | Rejected:
    """The activation that a function of sums computes and the order of its gates and ups, told by running it.

    Args:
        function: maps float32 sums ``[s, rows]`` of the first product, for any s, to ``[s, rows / 2]`` if there are
            gates among them, else to ``[s, rows]``.
        rows: of the first product.
        numbers: see `recognise_activation`.
        device: where the function runs.

    Returns:
        Activation and order (None without gates); or why not, with the first point at which the nearest differs.
    """
    run = partial(_run, function, device)
    try:
        orders = _orders(run, rows)
        return recognise_activation(partial(_of_pairs, run, orders[0], rows), orders, numbers)
    except _NoFunction as why:
        return Rejected(NONE, str(why))


def _run(function: Callable[[Tensor], Tensor], device: torch.device | str, sums: Tensor) -> Tensor:
    """The result as float32 on the CPU."""
    given, rows, sums = list(sums.shape), sums.shape[1], sums.to(device, copy=True)
    try:
        with torch.no_grad():
            out = function(sums)
    except Exception as error:  # whatever a model's own code raises
        raise _NoFunction(f"it cannot be run alone: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor) or list(out.shape) not in (given, [given[0], rows / 2]):
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise _NoFunction(f"it makes {found} of sums of shape {given}")
    return out.float().cpu()


def _orders(run: _Run, rows: int) -> tuple[Order | None, ...]:
    """The orders in which columns may be paired, None if each is alone.

    Each column is changed, or not, by the bits of its number, once by a bit and once by its opposite. So the changes of
    a result tell the columns it is made from.
    """
    number = torch.arange(rows)
    bits = torch.stack([number >> bit & 1 for bit in range(max(1, (rows - 1).bit_length()))]).bool()
    masks = torch.cat((bits, ~bits))
    draw = 1.25 + 0.25 * torch.rand((2, rows), generator=torch.Generator().manual_seed(0))
    out = run(torch.cat((draw[:1], torch.where(masks, -draw[1] / 4, draw[0]))))
    changed = (out[1:] - out[0]).abs() > 1e-3 * out.abs().amax()
    layouts: Sequence[tuple[Order | None, ...]] = ((None,),) if out.shape[1] == rows else _LAYOUTS
    wrong = [changed != torch.stack([masks[:, at] for at in kinds(first, rows)]).any(0) for first, *_ in layouts]
    for layout, differs in zip(layouts, wrong, strict=True):
        if not differs.any():
            return layout
    column, pair = int(wrong[0].any(0).nonzero()[0]), "of the same number" if len(wrong) == 1 else "of one pair"
    raise _NoFunction(f"column {column} of its result does not depend on the sums {pair}, or on others too")


def _of_pairs(run: _Run, order: Order | None, rows: int, *values: Tensor) -> Tensor:
    """The function of some points, each of which stands somewhere among the columns, and each column has 64 or more."""
    columns = kinds(order, rows)
    width, points = rows // len(columns), len(values[0])
    s = max(64, -(-points // width))
    index = (torch.randperm(s * width, generator=torch.Generator().manual_seed(0)) % points).view(s, width)
    sums = torch.empty((s, rows))
    for at, value in zip(columns, values, strict=True):
        sums[:, at] = value[index]
    out = run(sums)
    found = torch.empty(points).index_put_((index.flatten(),), out.flatten())
    differs = ~((out - found[index]).abs() <= 1e-5 * found[index].abs() + 1e-6 * (1 + values[-1][index].abs()))
    if differs.any():
        column = int(differs.any(0).nonzero()[0])
        raise _NoFunction(f"column {column} of its result is not computed as the others are")
    return found
