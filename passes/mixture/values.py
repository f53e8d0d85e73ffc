"""What is known of the tensors of a mixture: of each of their elements, which element of what it is.

A pair is a token and one of its choices: number ``token * choices + choice``. Tensors whose first axis is in the order
of sorted ids are held in the order of pairs: what is done row by row may be done before sorting as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from marlin_w4a16.passes.find.products import Product

Move = Callable[[Tensor], Any]


class NotUnderstood(ValueError):
    """An operation that is not known to leave a mixture what it is.

    Attributes:
        read: how many nodes were understood before it.
        rounds: see `outcome.Rejected`.
    """

    read = 0
    rounds = False


@dataclass(frozen=True, slots=True, eq=False)
class Sorted:
    """An order of the pairs by what became of their ids.

    Attributes:
        key: of each number that an id may be, what it was sorted by.
        pairs: the pairs in the order in which they stood before.
    """

    key: Tensor
    pairs: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Value:
    """A tensor.

    Attributes:
        at: an integer for each element: which one of its source it is.
        order: of its first axis, where that is sorted.
    """

    what: ClassVar[str]
    at: Tensor
    order: Sorted | None = None

    def moved(self, move: Move) -> Any:
        """What becomes of it where elements are only moved: a tuple if the move gives several tensors."""
        found = [self._keeping(move)(labels) for labels in self.labels()]
        if isinstance(found[0], Tensor):
            return self._relabelled(*found)
        return tuple(self._relabelled(*labels) for labels in zip(*found, strict=True))

    def labels(self) -> tuple[Tensor, ...]:
        """All integers that are known of each element."""
        return (self.at,)

    def _relabelled(self, at: Tensor, *_: Tensor) -> "Value":
        return replace(self, at=at)

    def _keeping(self, move: Move) -> Move:
        """The move, if it may be done before rows are sorted."""
        if self.order is not None:
            count = self.at.shape[0]
            rows = torch.arange(count).view(-1, *[1] * (self.at.ndim - 1)).expand(self.at.shape)
            found = move(rows)
            for part in [found] if isinstance(found, Tensor) else found:
                if part.ndim == 0 or len(part) != count or not bool((part == _column(part)).all()):
                    raise NotUnderstood(f"a move of the rows of {self.what} that are sorted by expert")
        return move


def _column(like: Tensor) -> Tensor:
    return torch.arange(len(like)).view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Plain(Value):
    """Numbers that depend on no input: ``at`` holds the numbers themselves.

    Attributes:
        fixed: nor do they depend on how many tokens there are.
        linear: they are positions, or sums and multiples of such: nothing was divided yet.
    """

    what: ClassVar[str] = "positions"
    fixed: bool = False
    linear: bool = True

    @property
    def varies(self) -> bool:
        """Whether its numbers are not all the same."""
        return bool((self.at != self.at.flatten()[:1]).any())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Unwritten(Value):
    """A tensor whose values do not matter."""

    what: ClassVar[str] = "values that were not written"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ids(Value):
    """A function of the id of each pair: ``at`` is the pair.

    Attributes:
        table: its values by the number that the id is.
        done: arithmetic led to them; of numbers of no expert, only those around some are looked at.
    """

    what: ClassVar[str] = "its experts' ids"
    table: Tensor
    done: bool = False

    @property
    def is_index(self) -> bool:
        """Whether a tensor that it indexes takes it for numbers; bools and bytes are masks."""
        return self.table.dtype in (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Places(Value):
    """Where each pair stands among the sorted ones: ``at`` is the pair; it is itself not sorted.

    Attributes:
        among: the order.
    """

    what: ClassVar[str] = "places among its sorted experts"
    among: Sorted


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Counts(Value):
    """How many pairs each expert has.

    Attributes:
        table: ``[d, experts]``: to which of them each number counts.
        ends: they are the ends of the rows of each.
    """

    what: ClassVar[str] = "the number of an expert's tokens"
    table: Tensor
    ends: bool = False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Tokens(Value):
    """Elements of tokens: ``at`` is ``token * hidden + column``.

    Attributes:
        pair: of each element, the pair whose routing weight or mask it has; or None.
        weighted: it is multiplied by its routing weight.
        zero: by the number that the id is, whether zero stands in their place; or None.
    """

    what: ClassVar[str] = "its tokens"
    pair: Tensor | None = None
    weighted: bool = False
    zero: Tensor | None = None

    def labels(self) -> tuple[Tensor, ...]:
        return (self.at,) if self.pair is None else (self.at, self.pair)

    def _relabelled(self, at: Tensor, *pair: Tensor) -> "Tokens":
        return replace(self, at=at, pair=pair[0] if pair else None)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights(Value):
    """Routing weights: ``at`` is the pair.

    Attributes:
        zero: by the number that the id is, whether zero stands in their place.
    """

    what: ClassVar[str] = "its routing weights"
    zero: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scores(Value):
    """Routing weights, or a function of them, spread over all experts: ``at`` is ``token * experts + expert``.

    Attributes:
        rest: what stands at experts that a token did not choose.
        of: tells those that were only moved from others.
    """

    what: ClassVar[str] = "its routing weights over all experts"
    rest: Tensor
    of: object


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Bias(Value):
    """The bias of a product.

    Attributes:
        of: the product.
        expert: None: ``at`` is ``expert * rows + row``. Else it was read at ids: ``at`` is ``pair * rows + row``, and
            this the expert by the number that the id is.
    """

    what: ClassVar[str] = "its biases"
    of: Product
    expert: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Between(Value):
    """A function of sums of the first product, one or two: ``at``, and ``other`` of a later row: ``pair * rows + row``.

    Attributes:
        compute: the function, of one or two tensors.
        polynomial: what it is of its one sum, within its limits: coefficients, the constant first; or None.
        limits: those that it passed, in their order.
        positive: it is more than zero everywhere.
        biased: the sums have their bias.
        fate: see `choices`; of the first product.
    """

    what: ClassVar[str] = "what stands between its products"
    other: Tensor | None = None
    compute: Callable[..., Tensor]
    polynomial: tuple[float, ...] | None = None
    limits: tuple[object, ...] = ()
    positive: bool = False
    biased: bool = False
    fate: Tensor

    def labels(self) -> tuple[Tensor, ...]:
        return (self.at,) if self.other is None else (self.at, self.other)

    def to(self, dtype: torch.dtype) -> "Between":
        """In another type; where sums are wider than 16 bits, as on a grid, to 16 bits it is not rounded."""
        first = self.compute

        def compute(*z: Tensor) -> Tensor:
            return first(*z).to(z[0].dtype if z[0].itemsize > dtype.itemsize == 2 else dtype)

        return replace(self, compute=compute)

    def _relabelled(self, at: Tensor, *other: Tensor) -> "Between":
        return replace(self, at=at, other=other[0] if other else None)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Results(Value):
    """Rows of the second product: ``at`` is ``pair * hidden + column``.

    Attributes:
        biased, weighted: they have their bias, their routing weight.
        fate: see `choices`.
    """

    what: ClassVar[str] = "what its experts give"
    biased: bool = False
    weighted: bool = False
    fate: Tensor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Parts(Value):
    """The sum over some choices of each token: ``at`` is ``token * hidden + column``.

    Attributes:
        choices: which of them.
        of: what is summed.
    """

    what: ClassVar[str] = "a sum of some of what its experts give"
    choices: frozenset[int]
    of: Results


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Totals(Value):
    """The sum over all choices: ``at`` is ``token * hidden + column``.

    Attributes:
        of: what was summed.
    """

    what: ClassVar[str] = "its sum"
    of: Results
