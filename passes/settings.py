"""What a user may choose about the pass; the front door's options say what each means."""

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
        """Why a weight is to be left alone, or None. Globs match its path or that of its module."""
        names = path, path.rpartition(".")[0]
        for pattern in self.exclude:
            if any(fnmatchcase(name, pattern) for name in names):
                return Excluded(f"it matches exclude={pattern!r}")
        if self.include is not None and not any(fnmatchcase(n, pattern) for pattern in self.include for n in names):
            return Excluded(f"it matches none of include={', '.join(map(repr, self.include))}")
        return None
