"""What is generated: a program with at most one thing wrong about it, and inputs that show it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Mutation:
    """One thing that is done to a program.

    Attributes:
        name: for people.
        place: what it replaces or follows, a name of the module's parts.
        change: what it does there.
        prepare: what it adds to the module before.
        then: what happens to the module before the second call.
        needs: what its inputs must hold beside the usual: ``"sentinels"``, ``"negative ids"``, ``"infinities"`` or
            ``"gradients"``.
        rounds: it computes in bfloat16 what is float32 without it.
        harmless: what a program computes is the same with it, so that a true one may have it.
    """

    name: str
    place: str = ""
    change: Callable[..., Any] | None = None
    prepare: Callable[[nn.Module], object] | None = None
    then: Callable[[nn.Module], object] | None = None
    needs: str = ""
    rounds: bool = False
    harmless: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """A program and how it is run.

    Attributes:
        seed: gives it again.
        form: how it is written.
        mutation: what is done to it.
        kind: ``"near"`` if that may change what it computes.
        module: takes one of ``calls`` after the other, each from a seed of its own; eager has a deep copy.
        calls: its inputs.
        then: what happens to either module before the second call.
        rounds: its result is one of bfloat16, whatever its dtype.
        setting: what holds during the calls, one of `attacks.settings.SETTINGS`.
    """

    seed: int
    form: str
    mutation: str
    kind: Literal["true", "near"]
    module: nn.Module
    calls: tuple[tuple[Tensor, ...], ...]
    then: Callable[[nn.Module], object] | None = None
    setting: str = "plain"
    rounds: bool = False

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers: beside others, then, not the same as alone."""
        return self.mutation.startswith("random")

    @property
    def name(self) -> str:
        return f"{self.form}: {self.mutation} (seed {self.seed})"


def mutations(place: str, changes: Mapping[str, Callable[..., Any]], **more: Any) -> list[Mutation]:
    """Of one place, by name."""
    return [Mutation(name, place, change, **more) for name, change in changes.items()]


def of_value(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A change for which a value is all that counts."""
    return lambda m, value, *more: change(value)


def seeded(seed: int) -> None:
    """Not by ``torch.manual_seed``, which keeps a stack trace for each kind of device."""
    torch.default_generator.manual_seed(seed)
