"""Finds what stands between the two products of an expert, told by what it does to data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import FUNCTIONS, Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.passes.outcome import Rejected

_LIMIT = 100.0  # of the dense part of the grid; numbers, and what lies around them, may be beyond
LARGEST = 1e12  # products of larger numbers are not held by float32
_MOST = 2000  # values along one axis
_REFERENCE = 0.7  # the gate while ups vary, and the up while gates do
NONE = "what stands between the two products is no activation of the op"


def recognise_activation(
    function: Callable[..., Tensor],
    orders: Sequence[Order | None],
    numbers: Iterable[float],
    bends: Iterable[float] = (),
) -> tuple[Activation, Order | None] | Rejected:
    """The activation that a function of sums computes, and in which order it takes gates and ups.

    Functions, numbers and orders make the hypotheses. The nearest one must be what the function gives, within 1e-5, on
    a grid of gates and ups: dense from -100 to 100 and around each number and bend, and from 1e-30 to 1e12 on both
    sides.

    Args:
        function: of the sums of the earlier rows of pairs and of the later ones, float32 tensors of one shape, element
            by element; of one tensor where there are no pairs.
        orders: what they are if the earlier ones are the gates, and if the later ones are; (None,) without pairs.
        numbers: what may be alpha, a limit or an offset, such as the float literals of the function; any sign will do.
        bends: sums at which a limit sets in or a slope changes.

    Returns:
        Activation and order (None without gates); or why not, with the first point at which the nearest differs.
    """
    bends = tuple(bends)
    known, line = _known(numbers, bends), line_of(numbers, bends)
    if len(line) > _MOST or any(abs(bend) > LARGEST for bend in bends):
        return Rejected(NONE, f"it has too many or too large numbers: {len(known)}, up to {max(known, default=0):g}")
    pairs = len(orders) > 1
    values = [grid.flatten() for grid in torch.meshgrid(line, line, indexing="ij")] if pairs else [line]
    with torch.no_grad():
        found = function(*values).float()
    lines = found[:: len(line)], found[: len(line)]  # where the other one is the reference
    refusals: list[tuple[int, Rejected]] = []
    for order, gate, up in ((orders[0], 0, 1), (orders[1], 1, 0)) if pairs else ((None, 0, None),):
        base = Activation(gated=False) if up is None else _up(line, lines[up], known)
        activation = _gate(line, found if up is None else lines[gate], base, known)
        wrong = _differences(activation, values[gate], None if up is None else values[up], found)
        if wrong is None:
            return activation, order
        refusals.append(wrong)
    return min(refusals, key=lambda wrong: wrong[0])[1]


def _known(numbers: Iterable[float], bends: Iterable[float]) -> tuple[float, ...]:
    return tuple(dict.fromkeys(abs(float(n)) for n in (*numbers, *bends) if 0 < abs(n) < LARGEST))


def line_of(numbers: Iterable[float], bends: Iterable[float]) -> Tensor:
    """The values along one axis of the grid, first the reference; see `recognise_activation`."""
    bends = tuple(bends)
    factors = torch.tensor([0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0], dtype=torch.float64)
    around = torch.tensor(_known(numbers, bends), dtype=torch.float64).outer(factors).flatten()
    far, near = (torch.linspace(-end, end, points) for end, points in ((_LIMIT, 101), (6.0, 49)))
    ends = torch.cat((torch.logspace(-30, -3, 10), torch.logspace(2.25, 12, 40))).double()
    steps = torch.tensor([-1, -0.1, -0.01, 0, 0.01, 0.1, 1], dtype=torch.float64)
    points = torch.tensor(sorted(bends), dtype=torch.float64)
    bent = torch.cat(((points[:, None] + steps).flatten(), (points[1:] + points[:-1]) / 2))
    values = torch.cat((far.double(), near.double(), around, -around, ends, -ends, bent)).float().tolist()
    return torch.tensor([_REFERENCE, *sorted(set(values))])


def _up(line: Tensor, found: Tensor, numbers: tuple[float, ...]) -> Activation:
    """The limit and offset of ups that are nearest, but for a factor, to what was found for ups on a line."""
    gate = torch.full_like(line, _REFERENCE)

    def differences(activation: Activation) -> int:
        expected = activation(gate, line).double()
        scaled = expected * (expected @ found.double() / (expected @ expected))
        close = 1e-5 * (found.abs() + scaled.abs()) + 1e-6 * found[0].abs()
        return int(((found - scaled).abs() > close).sum())

    offsets = (0.0, 1.0, *numbers, *(-n for n in (1.0, *numbers)))
    return _best(
        (Activation(up_limit=limit, up_offset=offset) for offset in offsets for limit in (None, *numbers)), differences
    )


def _gate(line: Tensor, found: Tensor, base: Activation, numbers: tuple[float, ...]) -> Activation:
    """The function, alpha and limit of gates that are nearest to what was found for gates on a line."""
    up = torch.full_like(line, _REFERENCE) if base.gated else None
    return _best(
        (
            replace(base, function=function, alpha=alpha, gate_limit=limit)
            for limit in (None, *numbers)
            for function in FUNCTIONS
            for alpha in ((1.0, *numbers) if function == "silu" else (1.0,))
        ),
        lambda activation: int(_differs(activation, line, up, found).sum()),
    )


def _best(hypotheses: Iterable[Activation], differences: Callable[[Activation], int]) -> Activation:
    """The first one that differs nowhere, else the one that differs least."""
    best, least = Activation(), -1
    for hypothesis in hypotheses:
        count = differences(hypothesis)
        if count < least or least < 0:
            best, least = hypothesis, count
        if not count:
            break
    return best


def _differences(activation: Activation, gate: Tensor, up: Tensor | None, found: Tensor) -> tuple[int, Rejected] | None:
    """How many results an activation does not explain, and the one of the smallest sums; None if there is none."""
    differs = _differs(activation, gate, up, found)
    if not differs.any():
        return None
    size = gate.abs() if up is None else gate.abs() + up.abs()
    at = int(size.masked_fill(~differs, torch.inf).argmin())
    sums = [f"{name} {float(t.flatten()[at]):g}" for name, t in (("gate", gate), ("up", up)) if t is not None]
    place = f"at {', '.join(sums) if up is not None else sums[0].replace('gate', 'z')}"
    expected = activation(gate, up).flatten()[at]
    told = f"expected {float(expected):.6g}, found {float(found.flatten()[at]):.6g}"
    return int(differs.sum()), Rejected(NONE, f"the nearest is {activation}: {place}: {told}")


def _differs(activation: Activation, gate: Tensor, up: Tensor | None, found: Tensor) -> Tensor:
    return ~((found - activation(gate, up)).abs() <= _tolerance(activation, gate, up))


def _tolerance(activation: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """1e-5 of each factor, and 1e-6 where the function is a small difference of larger terms, as gelu below -5."""
    tolerance = 1e-5 * replace(activation, gated=False)(gate).abs() + 1e-6
    if up is None:
        return tolerance
    size = up.abs() if activation.up_limit is None else up.abs().clamp(max=activation.up_limit)
    return tolerance * (size + abs(activation.up_offset))
