"""Rows of a mixture: gathered, put back, multiplied by their routing weight, given their bias, masked, summed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.passes.mixture.candidates import Candidate
from marlin_w4a16.passes.mixture.choices import NOTHING, OTHER, UNDEFINED, Choices
from marlin_w4a16.passes.mixture.products import with_bias
from marlin_w4a16.passes.mixture.values import (
    Between,
    Bias,
    Ids,
    NotUnderstood,
    Parts,
    Places,
    Plain,
    Results,
    Scores,
    Sorted,
    Tokens,
    Totals,
    Unwritten,
    Value,
    Weights,
)

MASKED = frozenset({Tokens, Weights, Between, Results})


class Rows:
    """What is done to rows of a mixture of so many tokens, each with so many choices."""

    def __init__(self, m: Candidate, choices: Choices, tokens: int, each: int) -> None:
        self.choices, self.tokens, self.each, self.spread = choices, tokens, each, m.first.route is None
        self._products = {Between: m.first, Results: m.second}
        self.scores: Scores | None = None  # those that were multiplied

    def gathered(self, base: Value, index: Value) -> Value:
        """``base[index]``."""
        if isinstance(base, Bias) and isinstance(index, Ids) and index.is_index:
            if base.expert is not None or base.at.ndim != 2 or not _counts_up(base.at.flatten()):
                raise NotUnderstood("biases whose rows were moved")
            at = index.at.unsqueeze(-1) * base.of.matrices.n + torch.arange(base.of.matrices.n)
            return Bias(at=at, order=index.order, of=base.of, expert=self.choices.indexed(index.table))
        if isinstance(index, Places):
            if base.order is not index.among or not _counts_up(index.at):
                raise NotUnderstood(f"{index.what}, of {base.what} in another order")
            return replace(base, order=None)
        if not isinstance(index, Plain) or base.order is not None or isinstance(base, Unwritten):
            raise NotUnderstood(f"{base.what} by {index.what}")
        if index.at.dtype.is_floating_point or index.at.dtype in (torch.bool, torch.uint8):
            raise NotUnderstood(f"{base.what} by a mask")
        if index.order is not None and index.at.ndim != 1:
            raise NotUnderstood(f"{base.what} by several axes of {index.what}")
        found: Value = base.moved(lambda at: at[index.at])
        return replace(found, order=index.order)

    def put(self, base: Any, index: Any, value: Any) -> Value:
        """``base[index] = value`` of what is not written yet, by a permutation: it puts rows back."""
        fresh = isinstance(base, Unwritten) or (isinstance(base, Plain) and base.order is None)
        if not (fresh and isinstance(index, Plain) and isinstance(value, Value) and index.order is not None):
            raise NotUnderstood(f"a write of {getattr(value, 'what', 'a number')}")
        if not _counts_up(index.at) or len(base.at) != len(index.at):
            raise NotUnderstood("a write by what is no permutation")
        if value.order is index.order:
            return replace(value, order=None)
        if isinstance(value, Plain) and value.order is None and _counts_up(value.at):
            return Places(at=value.at, among=index.order)
        raise NotUnderstood(f"a write of {value.what} in another order")

    def sorted(self, ids: Any, kwargs: dict[str, Any], rest: Sequence[Any]) -> tuple[Value, Value]:
        """``sort(ids)``: the sorted ones and where they were."""
        if kwargs.keys() - {"stable", "dim"} or any(x not in (0, -1) for x in (*rest, kwargs.get("dim", -1))):
            raise NotUnderstood(f"a sort of {ids.what} in another order")
        if ids.at.ndim != 1:
            raise NotUnderstood(f"a sort of {ids.what} by token")
        count = torch.arange(len(ids.at))
        if isinstance(ids, Plain) and ids.order is not None and _counts_up(ids.at):
            return ids, Places(at=count, among=ids.order)
        if not isinstance(ids, Ids) or ids.order is not None or ids.table.dtype == torch.bool:
            raise NotUnderstood(f"a sort of {ids.what}")
        order = Sorted(ids.table, ids.at)
        return replace(ids, order=order), Plain(at=count, order=order)

    def weighted(self, a: Value, b: Value) -> Value:
        """The product of tokens or results with routing weights."""
        value, weights = (a, b) if isinstance(b, Weights | Scores) else (b, a)
        if not isinstance(weights, Scores if self.spread else Weights) or not isinstance(value, Tokens | Results):
            raise NotUnderstood(f"mul of {a.what} and {b.what}")
        if value.order is not weights.order or (value.order is not None and value.at.ndim != weights.at.ndim):
            raise NotUnderstood(f"mul of {a.what} and {b.what} in another order")
        if isinstance(weights, Scores):
            if bool(weights.rest != 0):
                raise NotUnderstood(f"mul by {weights.what}, which are not zero where none was chosen")
            self.scores = weights
        at, pair = _broadcast(value.at, weights.at)
        zero = weights.zero if isinstance(weights, Weights) else torch.zeros(1, dtype=torch.bool)
        if isinstance(value, Tokens):
            if value.weighted or bool(zero.any()):
                raise NotUnderstood(f"{value.what} times {weights.what} twice, or masked")
            return replace(self._of_pairs(value, at, pair), weighted=True)
        width = self._width(value)
        if value.weighted or at.shape != value.at.shape or not torch.equal(at // width, pair):
            raise NotUnderstood(f"{value.what} times {weights.what} twice, or of other pairs")
        return replace(value, weighted=True, fate=torch.where(zero & (value.fate != UNDEFINED), NOTHING, value.fate))

    def with_bias(self, a: Value, b: Value) -> Value:
        """The sum of a product and its bias."""
        value, bias = (a, b) if isinstance(b, Bias) else (b, a)
        raw = isinstance(value, Between) and value.polynomial == (0.0, 1.0) and not value.limits
        fresh = isinstance(value, Results) and not value.weighted
        if not (isinstance(bias, Bias) and isinstance(value, Between | Results) and (raw or fresh)):
            raise NotUnderstood(f"add of {a.what} and {b.what}")
        if value.biased or value.order is not bias.order:
            raise NotUnderstood(f"add of {a.what} and {b.what} twice or in another order")
        n = bias.of.matrices.n
        if (bias.expert is None) != self.spread or bias.of is not self._products[type(value)]:
            raise NotUnderstood(f"add of {a.what} and {b.what} of all experts, or of the other product")
        wanted = (value.at // n % self.each) * n + value.at % n if self.spread else value.at
        if bias.at.ndim > value.at.ndim or not torch.equal(wanted, bias.at.expand_as(wanted)):
            raise NotUnderstood(f"add of {a.what} and {b.what} of other pairs or rows")
        if bias.expert is None:
            return replace(value, biased=True)
        if not self.choices.are_right(bias.expert):
            raise NotUnderstood(f"{bias.what} of other experts")
        return replace(value, biased=True, fate=with_bias(value.fate, bias.expert))

    def masked(self, value: Any, mask: Any, other: Any, kept: bool) -> Value:
        """A tensor in which zero stands where a function of the id says so (or, if ``kept``, does not)."""
        zero = bool((other.at == 0).all()) if isinstance(other, Plain) and other.fixed else other == 0
        if type(value) not in MASKED or not isinstance(mask, Ids) or mask.table.dtype != torch.bool:
            raise NotUnderstood(f"a mask of {getattr(value, 'what', 'a number')}")
        dead = ~mask.table if kept else mask.table
        if not zero or bool(dead[: self.choices.experts].any()):
            raise NotUnderstood(f"a mask of {value.what} by expert")
        if mask.order is not value.order or mask.at.ndim != value.at.ndim:
            raise NotUnderstood(f"a mask of {value.what} in another order")
        pair = mask.at.expand_as(value.at)
        if isinstance(value, Tokens):
            masked = dead if value.zero is None else value.zero | dead
            return replace(self._of_pairs(value, value.at, pair), zero=masked)
        own = value.labels() if isinstance(value, Weights) else [at // self._width(value) for at in value.labels()]
        if not all(torch.equal(pair, labels) for labels in own):
            raise NotUnderstood(f"a mask of {value.what} of other pairs")
        if isinstance(value, Weights):
            return replace(value, zero=value.zero | dead)
        fate = torch.where(dead, OTHER if isinstance(value, Between) else NOTHING, value.fate)
        found: Value = replace(value, fate=fate)
        return found

    def _of_pairs(self, value: Tokens, at: Tensor, pair: Tensor) -> Tokens:
        """Tokens that belong to pairs from here on."""
        if value.pair is not None and not (at.shape == value.at.shape and torch.equal(value.pair, pair)):
            raise NotUnderstood(f"{value.what}, of other pairs")
        return replace(value, at=at, pair=pair)

    def summed(self, value: Any, dim: Any, keepdim: bool) -> Totals:
        """The sum along one axis: all choices of each token, once each."""
        axis = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
        if not isinstance(value, Results) or not isinstance(axis, int) or value.order is not None:
            raise NotUnderstood(f"sum of {value.what}")
        n = self._width(value)
        at = value.at.movedim(axis, -1).sort(-1).values
        first = at[..., :1]
        if not torch.equal(at, first + n * torch.arange(self.each)) or bool((first // n % self.each != 0).any()):
            raise NotUnderstood(f"sum of {value.what}, not over all choices of a token")
        total = (first // (n * self.each)) * n + first % n
        return Totals(at=total.movedim(-1, axis) if keepdim else total[..., 0], of=value)

    def plus(self, a: Value, b: Value) -> Value:
        """The sum of results, or of sums of them, or of one of these and zeros: of other choices each."""
        zero = [x for x in (a, b) if isinstance(x, Plain)]
        if zero:
            value = b if zero[0] is a else a
            whole = len(zero) == 1 and zero[0].order is None and not bool(zero[0].at.any())
            if not whole or torch.broadcast_shapes(a.at.shape, b.at.shape) != value.at.shape:  # type: ignore[no-untyped-call]
                raise NotUnderstood(f"add of {a.what} and {b.what}")
            return self._part(value)
        left, right = self._part(a), self._part(b)
        of, other = left.of, right.of
        alike = (of.biased, of.weighted) == (other.biased, other.weighted) and torch.equal(of.fate, other.fate)
        if left.choices & right.choices or not alike or not torch.equal(left.at, right.at):
            raise NotUnderstood(f"add of {a.what} and {b.what}, of other tokens or of the same choices")
        choices = left.choices | right.choices
        if len(choices) == self.each:
            return Totals(at=left.at, of=of)
        return replace(left, choices=choices)

    def _part(self, value: Value) -> Parts:
        """The results of one choice as a sum."""
        if isinstance(value, Parts):
            return value
        if not isinstance(value, Results) or value.order is not None:
            raise NotUnderstood(f"add of {value.what}")
        n = self._width(value)
        choice = value.at // n % self.each
        if bool((choice != choice.flatten()[0]).any()):
            raise NotUnderstood(f"add of {value.what} of several choices")
        at = (value.at // (n * self.each)) * n + value.at % n
        return Parts(at=at, choices=frozenset([int(choice.flatten()[0])]), of=value)

    def contracted(self, equation: Any, value: Any, weights: Any = None) -> Totals:
        """``einsum`` of results, which it may multiply by their routing weights, over the choices of each token."""
        terms, _, out = str(equation).replace(" ", "").partition("->")
        axes, *others = terms.split(",")
        gone = [label for label in axes if label not in out]
        right = isinstance(value, Value) and len(axes) == value.at.ndim and out == axes.replace("".join(gone), "")
        if not right or len(gone) != 1 or len(set(axes)) < len(axes) or len(others) != (weights is not None):
            raise NotUnderstood(f"einsum {equation!r} of {getattr(value, 'what', 'a number')}")
        if weights is not None:
            named = others[0]
            if not isinstance(weights, Weights | Scores) or set(named) - set(axes) or len(set(named)) < len(named):
                raise NotUnderstood(f"einsum {equation!r} of {getattr(weights, 'what', 'a number')}")
            turned = weights.moved(lambda at: at.permute([named.index(label) for label in axes if label in named]))
            shape = tuple(slice(None) if label in named else None for label in axes)
            value = self.weighted(value, turned.moved(lambda at: at[shape]))
        return self.summed(value, axes.index(gone[0]), False)

    def added(self, base: Any, index: Any, value: Any) -> Totals:
        """``base.index_add(0, index, value)`` into zeros: the rows of each token, once each."""
        if not (isinstance(base, Plain) and base.order is None and bool((base.at == 0).all())):
            raise NotUnderstood("index_add to what is not zero")
        if not (isinstance(value, Results) and isinstance(index, Plain) and value.at.ndim == 2):
            raise NotUnderstood(f"index_add of {getattr(value, 'what', 'a number')}")
        n = self._width(value)
        pair = value.at[:, 0] // n
        whole = torch.equal(value.at, pair[:, None] * n + torch.arange(n)) and _counts_up(pair.sort().values)
        if value.order is not index.order or not whole or len(pair) != self.tokens * self.each:
            raise NotUnderstood(f"index_add of {value.what} that are not all, once each")
        if not torch.equal(index.at.long(), pair // self.each) or tuple(base.at.shape) != (self.tokens, n):
            raise NotUnderstood(f"index_add of {value.what} to other tokens")
        return Totals(at=torch.arange(self.tokens * n).view(self.tokens, n), of=value)

    def _width(self, value: Value) -> int:
        return self._products[type(value)].matrices.n


def _counts_up(at: Tensor) -> bool:
    return at.ndim == 1 and torch.equal(at.long(), torch.arange(len(at)))


def _broadcast(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return a.expand(shape), b.expand(shape)
