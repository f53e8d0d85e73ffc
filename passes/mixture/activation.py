"""Finds what stands between the two products of an expert, told by what it does to data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from marlin_w4a16.kernels.activation import FUNCTIONS, Activation
from marlin_w4a16.kernels.expert_order import Order, kinds
from marlin_w4a16.passes.outcome import Rejected

# Which is the gate, the first or the second column of a pair, where pairs lie in halves or side by side.
_LAYOUTS = ((Order.GATE_UP, Order.UP_GATE), (Order.INTERLEAVED, Order.INTERLEAVED_UP_GATE))
_LIMIT = 100.0  # of the grid of the proof; numbers, and what lies around them, may be beyond
_LARGEST = 1e12  # larger numbers limit nothing, and float32 does not hold products of them
_REFERENCE = 0.7  # the gate while ups vary, and the up while gates do
_NONE = "what stands between the two products is no activation of the op"


def recognise_activation(
    function: Callable[[Tensor], Tensor], rows: int, numbers: Sequence[float], device: torch.device | str = "cpu"
) -> tuple[Activation, Order | None] | Rejected:
    """The activation that a function computes and the order of its gates and ups, proved by running it.

    Functions, numbers and orders make the hypotheses. The nearest one must be what the function gives, within 1e-5, for
    gates and ups on a grid from -100 to 100 and around each number, which is spread over all columns.

    Args:
        function: maps float32 sums ``[s, rows]`` of the first product, for any s, to ``[s, rows / 2]`` if there are
            gates among them, else to ``[s, rows]``.
        rows: of the first product.
        numbers: what may be alpha, a limit or an offset, such as the float literals of the function; any sign will do.
        device: where the function runs.

    Returns:
        Activation and order (None without gates); or why not, with the first point at which the nearest differs.
    """
    run = partial(_run, function, device)
    layout = _layout(run, rows)
    if isinstance(layout, Rejected):
        return layout
    known = tuple(dict.fromkeys(abs(float(n)) for n in numbers if 0 < abs(n) < _LARGEST))
    line, columns = _line(known), kinds(layout[0], rows)
    index = _spread(len(line) ** len(columns), rows // len(columns))
    values = [line[index // len(line) ** axis % len(line)] for axis in range(len(columns))]
    sums = torch.empty((len(index), rows))
    for at, value in zip(columns, values, strict=True):
        sums[:, at] = value
    found = run(sums)
    if isinstance(found, Rejected):
        return found
    grid = torch.empty(len(line) ** len(columns)).index_put_((index.flatten(),), found.flatten())
    lines = grid[: len(line)], grid[:: len(line)]  # where the other one is the reference
    refusals: list[tuple[int, Rejected]] = []
    for order, gate, up in ((layout[0], 0, 1), (layout[1], 1, 0)) if len(layout) > 1 else ((None, 0, None),):
        base = Activation(gated=False) if up is None else _up(line, lines[up], known)
        activation = _gate(line, lines[gate], base, known)
        wrong = _differences(activation, values[gate], None if up is None else values[up], found)
        if wrong is None:
            return activation, order
        refusals.append(wrong)
    return min(refusals, key=lambda wrong: wrong[0])[1]


def _run(function: Callable[[Tensor], Tensor], device: torch.device | str, sums: Tensor) -> Tensor | Rejected:
    """The result as float32 on the CPU."""
    given, rows, sums = list(sums.shape), sums.shape[1], sums.to(device, copy=True)
    try:
        with torch.no_grad():
            out = function(sums)
    except Exception as error:  # whatever a model's own code raises
        return Rejected(f"{_NONE}: it cannot be run alone", f"{type(error).__name__}: {error}")
    if not isinstance(out, Tensor) or list(out.shape) not in (given, [given[0], rows / 2]):
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        return Rejected(_NONE, f"it makes {found} of sums of shape {given}")
    return out.float().cpu()


def _layout(run: Callable[[Tensor], Tensor | Rejected], rows: int) -> tuple[Order | None, ...] | Rejected:
    """The orders in which columns may be paired, None if each is alone.

    Each column is changed, or not, by the bits of its number, once by a bit and once by its opposite. So the changes of
    a result tell the columns it is made from.
    """
    number = torch.arange(rows)
    bits = torch.stack([number >> bit & 1 for bit in range(max(1, (rows - 1).bit_length()))]).bool()
    masks = torch.cat((bits, ~bits))
    draw = 1.25 + 0.25 * torch.rand((2, rows), generator=torch.Generator().manual_seed(0))
    out = run(torch.cat((draw[:1], torch.where(masks, -draw[1] / 4, draw[0]))))
    if isinstance(out, Rejected):
        return out
    changed = (out[1:] - out[0]).abs() > 1e-3 * out.abs().amax()
    layouts: Sequence[tuple[Order | None, ...]] = ((None,),) if out.shape[1] == rows else _LAYOUTS
    wrong = [changed != torch.stack([masks[:, at] for at in kinds(first, rows)]).any(0) for first, *_ in layouts]
    for layout, differs in zip(layouts, wrong, strict=True):
        if not differs.any():
            return layout
    column, pair = int(wrong[0].any(0).nonzero()[0]), "of the same number" if len(wrong) == 1 else "of one pair"
    return Rejected(_NONE, f"column {column} of its result does not depend on the sums {pair}, or on others too")


def _line(numbers: Sequence[float]) -> Tensor:
    """The values along one axis of the grid, first the reference."""
    factors = torch.tensor([0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0], dtype=torch.float64)
    around = torch.tensor(numbers, dtype=torch.float64).outer(factors).flatten()
    far, near = (torch.linspace(-end, end, points) for end, points in ((_LIMIT, 101), (6.0, 49)))
    values = torch.cat((far.double(), near.double(), around, -around)).float().tolist()
    return torch.tensor([_REFERENCE, *sorted(set(values))])


def _spread(points: int, columns: int) -> Tensor:
    """Points of a grid, ``[s, columns]``: each stands somewhere, and each column has 64 of them or more."""
    s = max(64, -(-points // columns))
    shuffled = torch.randperm(s * columns, generator=torch.Generator().manual_seed(0))
    return (shuffled % points).view(s, columns)


def _up(line: Tensor, found: Tensor, numbers: tuple[float, ...]) -> Activation:
    """The limit and offset of ups that are nearest, but for a factor, to what was found for ups on a line."""
    gate = torch.full_like(line, _REFERENCE)

    def differences(activation: Activation) -> int:
        expected = activation(gate, line).double()
        factor = (expected @ found.double() / (expected @ expected)).float()
        close = _tolerance(activation, gate, line)
        return int(((found - factor * expected.float()).abs() > factor.abs() * close).sum())

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
    place = f"at {', '.join(sums) if up is not None else sums[0].replace('gate', 'z')} in column {at % gate.shape[1]}"
    expected = activation(gate, up).flatten()[at]
    told = f"expected {float(expected):.6g}, found {float(found.flatten()[at]):.6g}"
    return int(differs.sum()), Rejected(_NONE, f"the nearest is {activation}: {place}: {told}")


def _differs(activation: Activation, gate: Tensor, up: Tensor | None, found: Tensor) -> Tensor:
    return ~((found - activation(gate, up)).abs() <= _tolerance(activation, gate, up))


def _tolerance(activation: Activation, gate: Tensor, up: Tensor | None) -> Tensor:
    """1e-5 of each factor, and 1e-6 where the function is a small difference of larger terms, as gelu below -5."""
    tolerance = 1e-5 * replace(activation, gated=False)(gate).abs() + 1e-6
    if up is None:
        return tolerance
    size = up.abs() if activation.up_limit is None else up.abs().clamp(max=activation.up_limit)
    return tolerance * (size + abs(activation.up_offset))
