"""What a user may choose about the pass; the front door's options say what each means."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from marlin_w4a16.passes.outcome import Excluded

ActivationQuant = Literal["keep", "drop", "refuse"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What is accepted beyond weights that equal their decode; see `marlin_w4a16.options.Options`.

    Attributes:
        tolerance: the largest relative difference of a weight that the model rounds more than once.
        recover: read dense weights that are MXFP4 values back.
        drop_activations: leave out what a tensor's class does to the other operand.
    """

    tolerance: float = 0.0
    recover: bool = False
    drop_activations: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """See `marlin_w4a16.options.Options`."""

    rules: Rules = field(default_factory=Rules)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    verify: bool = False
    activation_quant: ActivationQuant = "keep"
    linear: bool = True
    moe: bool = True
    grouped: bool = True

    def excluded(self, path: str) -> Excluded | None:
        """Why a weight is to be left alone, or None."""
        return excluded_by(path, self.exclude) or not_included(path, self.include)


def excluded_by(path: str, exclude: Iterable[str]) -> Excluded | None:
    """The first glob that a weight matches, or None."""
    return next((Excluded(f"it matches exclude={glob!r}") for glob in exclude if _matches(path, glob)), None)


def not_included(path: str, include: Iterable[str] | None) -> Excluded | None:
    """The globs, where there are any, of which a weight matches none, or None."""
    if include is None or any(_matches(path, glob) for glob in include):
        return None
    return Excluded(f"it matches none of include={', '.join(map(repr, include))}")


def _matches(path: str, glob: str) -> bool:
    """Globs match the path of a weight or that of its module."""
    return fnmatchcase(path, glob) or fnmatchcase(path.rpartition(".")[0], glob)
