"""Reads a part of a graph as a mixture of experts, operation by operation, for every input that it may have.

Nothing is run on data. Of each tensor it is known which element of what each of its elements is (`values`): tokens and
results are only moved, each by a routing weight once multiplied and summed; ids are followed for every number that they
may be (`choices`); what stands between the products is a function of its sums alone (`pointwise`). An operation that
is not known to leave it at that is refused by its name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.passes.graph.constants import value_of_constant
from marlin_w4a16.passes.graph.names import dtype_name
from marlin_w4a16.passes.graph.nodes import example, layout, literals, storage
from marlin_w4a16.passes.graph.torch_private import size_at
from marlin_w4a16.passes.mixture.call import Call
from marlin_w4a16.passes.mixture.candidates import Candidate
from marlin_w4a16.passes.mixture.choices import Choices, Negatives
from marlin_w4a16.passes.mixture.operations import CASTS, MOVES, operation
from marlin_w4a16.passes.mixture.pointwise import Bends
from marlin_w4a16.passes.mixture.products import multiplied
from marlin_w4a16.passes.mixture.rows import Rows
from marlin_w4a16.passes.mixture.rules import Rules
from marlin_w4a16.passes.mixture.values import (
    Between,
    Bias,
    Counts,
    Ids,
    NotUnderstood,
    Places,
    Plain,
    Results,
    Scores,
    Tokens,
    Totals,
    Unwritten,
    Value,
    Weights,
)

_NUMBERS = (Plain, Unwritten, Ids, Places, Counts)  # followed as they are, whatever their type
_HOLDING = (torch.int32, torch.int64, torch.float32, torch.float64)  # what any number of rows may be counted in
_MOST = 1024  # integers of a constant that are looked at
_LAYOUTS = ((Order.GATE_UP, Order.UP_GATE), (Order.INTERLEAVED, Order.INTERLEAVED_UP_GATE))


@dataclass(frozen=True, slots=True)
class Understood:
    """What was read.

    Attributes:
        function: what stands between the products: of the sums of the earlier rows of pairs and of the later ones, or
            of each sum alone.
        orders: what they are if the earlier ones are the gates, and if the later ones are; (None,) without pairs.
        bends: the numbers of the function and where it may bend.
        negatives: what ids below zero are.
    """

    function: Callable[..., Tensor]
    orders: tuple[Order | None, ...]
    bends: Bends
    negatives: Negatives


def understand(m: Candidate, times: int = 1) -> Understood:
    """Reads a candidate, as if it had been traced with so many times the tokens.

    Raises:
        NotUnderstood: it does something else than a mixture of experts, or what is not known.
    """
    return _Reading(m, times).run()


class _Written:
    """Stands for a tensor that was written to by another name."""


class _Reading:
    """Reads one candidate for one number of tokens."""

    def __init__(self, m: Candidate, times: int) -> None:
        self.m, self.times = m, times
        self.choices = Choices.of(m.experts, example(m.ids).dtype, None if m.ranked else _integers(m))
        self.tokens, k = self._sizes(m.ids)
        self.traced = [example(node).shape[0] for node in m.given]
        if not self.tokens * k:
            raise NotUnderstood("no tokens")
        if example(m.first.node).dtype != example(m.second.node).dtype:
            raise NotUnderstood("products that are computed in two types")
        self.spread = m.first.route is None
        self.each = m.experts if self.spread else k  # choices of each token
        self.bends = Bends()
        self.narrow = _narrower(m)
        self.rows = Rows(m, self.choices, self.tokens, self.each)
        self.rules = Rules(self.rows, self.bends, is_dynamic(m), m.trained)
        self.on_input = False
        self.function: Between | None = None
        self.values: dict[fx.Node, Any] = self._entering()

    def run(self) -> Understood:
        """Reads node by node."""
        m = self.m
        gathers = m.gathers
        for place, node in enumerate(m.nodes):
            if node in gathers:
                continue
            try:
                self._read(node)
            except NotUnderstood as why:
                told = NotUnderstood(f"{why} (at {node.name})")
                told.read, told.rounds = place, why.rounds
                raise told from None
        return self._judged(self._get(m.output))

    def _entering(self) -> dict[fx.Node, Any]:
        """What is given and the constants."""
        m, none = self.m, torch.zeros(len(self.choices.numbers), dtype=torch.bool)
        pairs = torch.arange(self.tokens * self._sizes(m.ids)[1]).view(self._sizes(m.ids))
        tokens = torch.arange(self.tokens * m.first.matrices.k).view(self._sizes(m.x))
        found: dict[fx.Node, Any] = {
            m.x: Tokens(at=tokens), m.ids: Ids(at=pairs, table=self.choices.numbers),
            m.weights: Weights(at=pairs, zero=none),
        }  # fmt: skip
        for node in m.constants:
            of = {m.bias13: m.first, m.bias2: m.second}.get(node)
            if of is not None:
                found[node] = Bias(at=torch.arange(m.experts * of.matrices.n).view(m.experts, -1), of=of)
            else:
                value = value_of_constant(node, m.known, {})
                found[node] = Plain(at=value.cpu(), fixed=True) if isinstance(value, Tensor) else value
        return found | {node: Unwritten(at=torch.zeros(self._sizes(node))) for node in m.shapes}

    def _read(self, node: fx.Node) -> None:
        m = self.m
        if node.op == "placeholder":
            try:
                self.values[node] = size_at(example(node), self.times)
            except ValueError as error:
                raise NotUnderstood(str(error)) from None
            return
        if node in (m.first.node, m.second.node):
            which = m.first if node is m.first.node else m.second
            sums = m.first.matrices.n if which is m.second else 0
            self.values[node] = multiplied(which, sums, self._get, self.choices, self.each)
            entered = self._get(which.x_node)
            if isinstance(entered, Tokens):
                self.on_input = entered.weighted
            else:
                self.function = entered
        else:
            name, written = operation(node)
            args, kwargs = fx.map_arg((list(node.args), dict(node.kwargs)), self._get)
            if name == "where" and node.op == "call_method":  # of what is kept, told before the condition
                args[:2] = args[1::-1]
            value = self.rules.apply(name, args, kwargs, Call.of(node, self.values, self.traced))
            if written:
                self._write(node, value)
            self.values[node] = None if name == "setitem" else value
        self._check(node, self.values[node], operation(node)[0] in CASTS | MOVES)

    def _get(self, node: fx.Node) -> Any:
        value = self.values[node]
        if isinstance(value, _Written):
            raise NotUnderstood(f"{node.name}, which was written to by another name, is read")
        return value

    def _write(self, node: fx.Node, value: Any) -> None:
        """What has the storage of a tensor that was written to: the same elements have the value, others none."""
        target = node.args[0] if node.args else node.kwargs.get("input")
        name, _ = operation(node)
        if not isinstance(target, fx.Node) or not isinstance(value, Value) or name in MOVES:
            raise NotUnderstood(f"{name} in place")
        for other in [n for n in self.values if n is target or (storage(n) == storage(target) is not None)]:
            like = example(other)
            same = isinstance(like, Tensor) and layout(other) == layout(target)
            if isinstance(like, Tensor):
                self.values[other] = value if same else _Written()
                self._check(other, self.values[other], as_it_is=True)

    def _check(self, node: fx.Node, value: Any, as_it_is: bool) -> None:
        """Refuses narrow types, and shapes that are not those that were traced; ``as_it_is``: nothing is computed."""
        like = example(node)
        if not isinstance(value, Value) or not isinstance(like, Tensor):
            return
        if tuple(value.at.shape) != self._sizes(node):
            raise NotUnderstood(f"{value.what} of shape {tuple(value.at.shape)}, traced as {self._sizes(node)}")
        if isinstance(value, _NUMBERS):
            counts = isinstance(value, Places | Counts) or (isinstance(value, Plain) and not value.fixed)
            if counts and like.dtype not in _HOLDING and (like.dtype != torch.bool or not isinstance(value, Plain)):
                raise NotUnderstood(f"{value.what} in {dtype_name(like.dtype)}")
            return
        if not self.narrow(like.dtype):
            return
        own = {Tokens: self.m.x, Weights: self.m.weights, Totals: self.m.output}.get(type(value))
        if isinstance(value, Bias):
            own = self.m.bias2 if value.of is self.m.second else self.m.bias13
        if not as_it_is or own is None or like.dtype != example(own).dtype:
            why = NotUnderstood(f"a cast of {value.what} to {dtype_name(like.dtype)}")
            why.rounds = True
            raise why

    def _judged(self, found: Any) -> Understood:
        """What the sum says of the mixture."""
        m, function = self.m, self.function
        if isinstance(found, Results) and self.each == 1 and found.order is None:
            found = Totals(at=found.at, of=found)
        if not isinstance(found, Totals) or function is None:
            raise NotUnderstood(f"{getattr(found, 'what', 'what it gives')} where the sum is expected")
        if self.spread and self.rows.scores is not None:
            whole = self.values[m.scores] if m.scores is not None else None
            if not isinstance(whole, Scores) or whole.of is not self.rows.scores.of:
                raise NotUnderstood(f"{Scores.what} that are changed after they are spread")
        half = example(m.first.node).dtype == torch.float16  # by autocast, too
        if half and example(m.output).dtype != torch.float16:
            raise NotUnderstood(f"{found.what} of float16 experts in a type that holds more")
        if half and m.on_input and example(m.x).dtype != torch.float16:
            raise NotUnderstood(f"{Tokens.what} that are weighted in a type that holds more than float16")
        if not torch.equal(found.at, torch.arange(found.at.numel()).view(found.at.shape)):
            raise NotUnderstood("its sums are in another order than its tokens")
        of = found.of
        biased, weighted = (function.biased, of.biased), (self.on_input, of.weighted)
        if weighted != (m.on_input, not m.on_input) or biased != (m.bias13 is not None, m.bias2 is not None):
            raise NotUnderstood("routing weights or biases that are left out or used twice")
        if self.spread and self.on_input and any(biased):  # experts that were not chosen would add their biases
            raise NotUnderstood(f"{Bias.what} of all experts")
        negatives = self.choices.negatives(of.fate)
        if negatives is None:
            raise NotUnderstood("ids of no expert that add something")
        return Understood(function.compute, self._orders(function), self.bends, negatives)

    def _orders(self, function: Between) -> tuple[Order | None, ...]:
        """The orders in which sums are paired: `multiplied` has checked that the rows are whole."""
        if function.other is None:
            return (None,)
        n = self.m.first.matrices.n
        apart = int((function.other - function.at).flatten()[0])
        return _LAYOUTS[1] if apart == 1 and n > 2 else _LAYOUTS[0]

    def _sizes(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(size_at(size, self.times) for size in example(node).shape)


def is_dynamic(m: Candidate) -> bool:
    """Whether the number of its tokens is not fixed."""
    return not all(isinstance(size, int) for node in m.given for size in example(node).shape)


def _integers(m: Candidate) -> set[int]:
    """The numbers that stand in its operations, and those of its constants; of fractions those on both sides."""
    found = [value for value in literals(m.nodes) if isinstance(value, int | float)]
    for node in m.constants:
        like = example(node)
        if isinstance(like, Tensor) and like.numel() <= _MOST and node not in (m.bias13, m.bias2):
            found += value_of_constant(node, m.known, {}).flatten().tolist()
    finite = [number for number in found if math.isfinite(number)]
    return {*map(math.floor, finite), *map(math.ceil, finite)}


def _narrower(m: Candidate) -> Callable[[torch.dtype], bool]:
    """Whether a type holds less than what the experts are computed in."""
    wide = {torch.float32, torch.float64, example(m.first.x_node).dtype, example(m.first.node).dtype}
    return lambda dtype: dtype not in wide


def read_for_all(m: Candidate) -> Understood:
    """Reads a candidate; where the number of its tokens is not fixed, for several.

    Raises:
        NotUnderstood: see `understand`.
    """
    found = understand(m)
    if is_dynamic(m):
        for times in (2, 3):
            again = understand(m, times)
            if (again.orders, again.negatives, again.bends) != (found.orders, found.negatives, found.bends):
                raise NotUnderstood("it is another mixture with more tokens")
    return found
