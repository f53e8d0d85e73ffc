"""What a form is: one way to write an FP4 product in plain PyTorch, and what the backend owes it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Outcome = Literal["replaced", "tolerance", "refused", "no candidate"]


@dataclass(frozen=True, slots=True)
class Program:
    """One way to write it.

    Attributes:
        name: for people, such as ``"table + stack"``; unique in its section.
        section: the heading it stands under.
        build: makes a module and its inputs; random, so seed before.
        outcome: ``"replaced"``; ``"tolerance"``: refused, but replaced under the option; ``"refused"`` with a reason;
            ``"no candidate"``: nothing in it is FP4, so nothing is said.
        tolerance: the largest relative difference between an element of its weight and the exact decode, where its
            own arithmetic in 16 bits makes one.
        reason: a part of the reason of a refusal, where it is known.
        weights: how many FP4 weights a report counts.
        dtype: what the weight is computed in.
    """

    name: str
    section: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    outcome: Outcome = "replaced"
    tolerance: float | None = None
    reason: str | None = None
    weights: int = 1
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.section}: {self.name}"
