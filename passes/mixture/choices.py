"""What becomes of each number that may stand among the ids of a mixture: those of experts, and those of none."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.passes.find.routes import Call
from marlin_w4a16.passes.graph.nodes import example

# What becomes of a number that leads to no expert: it adds nothing, it does what nobody may rely on, such as an index
# that does not exist, or it adds something else than an expert's row times its routing weight.
NOTHING, UNDEFINED, OTHER = -1, -2, -3
_FAR = 1 << 30
_MOVED = frozenset({"to", "long", "int", "view", "reshape", "contiguous", "flatten", "clone", "detach"})
_RANKED = (torch.topk, "topk", torch.sort, "sort")


class Negatives(Enum):
    """What the model takes ids below zero for, where nothing says that there are none."""

    NONE = "none"  # of no expert, as the op does
    FROM_THE_END = "counted from the end"
    FIRST = "the first expert"

    def applied(self, call: Call, ids: Any, experts: int) -> Any:
        """The ids of which the op makes what the model makes of ``ids``."""
        if self is Negatives.FROM_THE_END:
            return call(torch.remainder, ids, experts)
        return call(torch.clamp, ids, 0) if self is Negatives.FIRST else ids


@dataclass(frozen=True, slots=True)
class Choices:
    """The numbers that ids may be.

    Attributes:
        experts: how many experts there are.
        numbers: ``[d]``: every expert, then some of the others.
    """

    experts: int
    numbers: Tensor

    @classmethod
    def of(cls, ids: fx.Node, experts: int, met: Iterable[int] = ()) -> "Choices":
        """Those of the ids of a graph; those of no expert are left out where the graph shows that there are none.

        ``met``: integers that a graph holds; what it does to numbers of no expert may change around each.
        """
        others = [] if _are_ranks(ids, experts) else list(_of_none(experts, met))
        return cls(experts, torch.tensor([*range(experts), *others]))

    def indexed(self, table: Tensor) -> Tensor:
        """The expert of each number that indexes a stack as ``table`` says."""
        found = torch.where(table < 0, table + self.experts, table)
        return torch.where((found >= 0) & (found < self.experts), found, UNDEFINED)

    def are_right(self, fate: Tensor) -> bool:
        """Whether each expert's number leads to that expert."""
        return bool((fate[: self.experts] == self.numbers[: self.experts]).all())

    def negatives(self, fate: Tensor) -> Negatives | None:
        """How the op is to be given ids so that each number has its fate, or None."""
        for way in Negatives:
            given = torch.where(self.numbers < _FAR, way.applied(lambda f, *a: f(*a), self.numbers, self.experts), _FAR)
            done = torch.where((given >= 0) & (given < self.experts), given, NOTHING)
            if bool(((fate == done) | (fate == UNDEFINED)).all()):
                return way
        return None


def _of_none(experts: int, met: Iterable[int]) -> dict[int, None]:
    """Numbers of no expert: the next ones, far ones, powers of two, and as many as there are experts around others."""
    powers = [1 << bit for bit in range(31)]
    about = [n for met_one in met if abs(met_one) < _FAR for n in (met_one, -met_one, ~met_one)]
    near = [n + step for n in (experts, 2 * experts, -experts, *about) for step in range(-2, experts + 2)]
    numbers = [_FAR, -_FAR, *powers, *(-n for n in powers), *near]
    return dict.fromkeys(n for n in numbers if not 0 <= n < experts)


def _are_ranks(ids: fx.Node, experts: int) -> bool:
    """Whether ids are places among as many scores as there are experts, or fewer: what a router chooses."""
    node: Any = ids
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _MOVED:
        if example(node).dtype not in (torch.int64, torch.int32):
            return False
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != 1:
        return False
    ranked: Any = node.args[0]
    if not isinstance(ranked, fx.Node) or ranked.target not in _RANKED:
        return False
    scores = example(ranked.args[0] if ranked.args else ranked.kwargs["input"])
    position = 2 if ranked.target in (torch.topk, "topk") else 1
    dim = ranked.args[position] if len(ranked.args) > position else ranked.kwargs.get("dim", -1)
    return isinstance(dim, int) and isinstance(scores.shape[dim], int) and scores.shape[dim] <= experts
