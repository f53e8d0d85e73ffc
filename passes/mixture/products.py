"""The two products of a mixture, read row by row: which pair of token and choice each row belongs to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.passes.find.products import Product, operands_of
from marlin_w4a16.passes.find.routes import as_rows, at_once, from_rows
from marlin_w4a16.passes.graph.torch_private import GROUPED_MM
from marlin_w4a16.passes.mixture.choices import NOTHING, OTHER, UNDEFINED, Choices
from marlin_w4a16.passes.mixture.values import Between, Counts, Ids, NotUnderstood, Results, Sorted, Tokens, Value

Get = Callable[[fx.Node], Any]


def multiplied(which: Product, sums: int, get: Get, choices: Choices, each: int) -> Between | Results:
    """What a product gives.

    Args:
        which: the product.
        sums: rows of the first product for the second one, or 0 for the first one.
        get: what is known of a node.
        choices: the numbers that ids may be.
        each: how many choices a token has.

    Raises:
        NotUnderstood: a row of its input is not what its pair has there, or gets the matrix of another expert.
    """
    axes, n, k, name = which.equation, which.matrices.n, which.matrices.k, which.spelling.name
    operands = operands_of(which, which.node)
    if which.spelling.added is not None and operands.get(which.spelling.added) is not None:
        raise NotUnderstood(f"{name} with what it adds")
    x = get(which.x_node)
    if not isinstance(x, Between if sums else Tokens):
        raise NotUnderstood(f"{name} of {getattr(x, 'what', 'a number')}")
    if which.x_first:
        raise NotUnderstood(f"{name} of an input that is broadcast")
    if x.order is not None and not axes.x[0] == (axes.batch + axes.free)[0] == axes.out[0]:
        raise NotUnderstood(f"{name} of rows that are sorted by expert along another axis")
    labels = [as_rows(at_once, axes, part) for part in x.labels()]
    rows, lead = [part for part, _ in labels], labels[0][1]
    routed, fate = _routed(which, x, len(rows[0]), get, choices)
    if isinstance(x, Tokens):
        pair = _pairs_of_tokens(rows, k, routed, which.route is None, each)
        fate = fate if x.zero is None else torch.where(x.zero & (fate >= 0), OTHER, fate)
    else:
        pair = rows[0][:, 0] // sums
        if not torch.equal(pair % each if which.route is None else pair, routed):
            raise NotUnderstood("rows that go from one expert to another between its products")
        _check_columns(rows, pair * sums, k, sums)
        fate = _both(x.fate, fate)
    if not choices.are_right(fate):
        raise NotUnderstood(f"{name} by experts that others were chosen for")
    at = from_rows(at_once, axes, (), lead, pair[:, None] * n + torch.arange(n))
    if not sums:
        return Between(at=at, order=x.order, compute=lambda z: z, polynomial=(0.0, 1.0), fate=fate)
    return Results(at=at, order=x.order, fate=fate)


def _routed(which: Product, x: Value, rows: int, get: Get, choices: Choices) -> tuple[Tensor, Tensor]:
    """The pair that each row is routed by, or its expert where there is no route; and the fate of each number."""
    route, name = which.route, which.spelling.name
    if route is None:
        if x.order is not None:
            raise NotUnderstood(f"{name} of rows that are sorted by expert")
        expert = torch.arange(choices.experts).repeat_interleave(rows // choices.experts)
        known = (choices.numbers >= 0) & (choices.numbers < choices.experts)
        return expert, torch.where(known, choices.numbers, UNDEFINED)
    routing = get(route.node)
    if route.by == "offsets":
        if not isinstance(routing, Counts) or not routing.ends or x.order is None:
            raise NotUnderstood(f"{name} of rows that are not sorted by expert, or by ends that are not theirs")
        return x.order.pairs, _assigned(x.order, routing.table, choices, which.node.target is GROUPED_MM)
    if not isinstance(routing, Ids) or routing.order is not x.order or not routing.is_index:
        raise NotUnderstood(f"{name} by {getattr(routing, 'what', 'a number')}, in another order than its rows")
    pairs = routing.at.flatten()
    return pairs.repeat_interleave(rows // len(pairs)), choices.indexed(routing.table)


def _assigned(order: Sorted, counts: Tensor, choices: Choices, garbage: bool) -> Tensor:
    """The expert whose rows the pairs of each number are among, once they are sorted.

    Numbers below all experts that are not counted move the rows of all others: what a model does of them is nothing to
    rely on. So are rows behind the last end where the product leaves them unwritten.
    """
    key, known = order.key, counts.sum(1)
    expert = counts.argmax(1)
    found = torch.full_like(choices.numbers, OTHER)
    found[(known == 1) & (counts.amax(1) == 1) & (key == expert)] = 0
    found = torch.where(found == 0, expert, found)
    nowhere = (known == 0) & (counts.abs().amax(1) == 0)
    found[nowhere & (key >= choices.experts)] = UNDEFINED if garbage else NOTHING
    found[nowhere & (key < 0)] = UNDEFINED
    return found


def _pairs_of_tokens(rows: Sequence[Tensor], k: int, routed: Tensor, spread: bool, each: int) -> Tensor:
    """The pair of each row of the first product's input."""
    at = rows[0]
    token = at[:, 0] // k
    if not torch.equal(at, token[:, None] * k + torch.arange(k)):
        raise NotUnderstood("tokens whose columns were moved, or are not whole")
    pair = token * each + routed if spread else routed
    if len(pair) != len(token) or not torch.equal(pair // each, token):
        raise NotUnderstood("tokens that go to the experts of others")
    if len(rows) > 1 and not bool((rows[1] == pair[:, None]).all()):
        raise NotUnderstood("tokens that are multiplied by the routing weights of others")
    return pair


def _check_columns(rows: Sequence[Tensor], start: Tensor, k: int, sums: int) -> None:
    """Refuses rows that are not the sums of one pair in order: alone, in halves, or side by side."""
    columns = torch.arange(k)
    ways = [(columns, columns + k), (2 * columns, 2 * columns + 1)] if len(rows) == 2 else [(columns,)]
    found = [all(torch.equal(part, start[:, None] + at) for part, at in zip(rows, way, strict=True)) for way in ways]
    if not any(found) or len(rows) * k != sums:
        raise NotUnderstood("sums whose gates and ups are neither halves nor side by side, or are not whole")


def _both(first: Tensor, second: Tensor) -> Tensor:
    """The fate of what goes through both products; what the second leaves out adds nothing, whatever it was."""
    found = torch.where(first == second, second, OTHER)
    found = torch.where(second == NOTHING, NOTHING, found)
    return torch.where((first == UNDEFINED) | (second == UNDEFINED), UNDEFINED, found)


def with_bias(fate: Tensor, expert: Tensor) -> Tensor:
    """The fate of rows to which the bias of an expert was added."""
    return torch.where((fate == UNDEFINED) | (expert == UNDEFINED), UNDEFINED, torch.where(fate == expert, fate, OTHER))
