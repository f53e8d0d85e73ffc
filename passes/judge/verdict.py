"""Whether a weight is what a recipe reads: the whole of it is held against that, element by element."""

from dataclasses import dataclass

from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight, format_name
from marlin_w4a16.passes.graph.names import dtype_name
from marlin_w4a16.passes.judge.decode import Decode
from marlin_w4a16.passes.judge.recipe import Leaves, Recipe
from marlin_w4a16.passes.judge.roundings import Roundings, first_difference, largest_error
from marlin_w4a16.passes.outcome import Excluded, Rejected
from marlin_w4a16.passes.settings import Rules


@dataclass(frozen=True, slots=True)
class Found:
    """A weight that was recognised.

    Attributes:
        recipe: where it is read from.
        roundings: what the model rounds on the way.
        weight: the weight.
        note, detail: what a reader of the report should know, or None; see `outcome.Replaced`.
    """

    recipe: Recipe
    roundings: Roundings
    weight: FP4Weight
    note: str | None = None
    detail: str | None = None

    @property
    def format(self) -> str:
        """The name of the format for people."""
        return format_name(self.recipe.kind, self.recipe.group)


Verdict = Found | Rejected | Excluded


@dataclass(frozen=True, slots=True)
class TooFar:
    """Recognised, but rounded on the way by more than the tolerance."""

    refusal: Rejected


def judge_again(
    recipe: Recipe, roundings: Roundings, decode: Decode, leaves: Leaves, name: str, rules: Rules
) -> Found | Rejected:
    """Holds a known recipe against other leaves, or those of another decode of the same signature."""
    value = decode.weight(leaves)
    if not bool(value.isfinite().all()):
        return Rejected(f"the traced weight holds NaN or Inf in {dtype_name(value.dtype)}")
    return settled(judged(recipe, roundings, decode, leaves, name, rules, value))


def settled(found: Found | Rejected | TooFar) -> Found | Rejected:
    """A verdict, without a difference between refusals."""
    return found.refusal if isinstance(found, TooFar) else found


def judged(
    recipe: Recipe, roundings: Roundings, decode: Decode, leaves: Leaves, name: str, rules: Rules, value: Tensor
) -> Found | Rejected | TooFar:
    """Holds a recipe against the whole of a traced weight."""
    try:
        weight, factor = recipe.read(decode, leaves, name)
    except ValueError as problem:
        return Rejected(str(problem).removeprefix(f"{name}: "))
    format = format_name(recipe.kind, recipe.group)
    first = first_difference(roundings, weight, factor, value)
    if first is not None:
        return Rejected(f"it is not {format}", str(first))
    if roundings.exact:
        return Found(recipe, roundings, weight)
    error = largest_error(weight, value)
    if error <= rules.tolerance:
        return Found(recipe, roundings, weight, f"{roundings}, exact here", f"they differ by up to {error:.2g}")
    within, named = roundings.tolerance
    enough = named if error <= within else f"{error * 1.01:.3g}"
    why = f"{format}, {roundings}: options={{'tolerance': {enough}}} accepts it"
    return TooFar(Rejected(why, f"it differs from its exact decode by up to {error:.2g}"))
