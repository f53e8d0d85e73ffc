"""What was swapped in a model, one row per linear or Experts module, where its modules stand, what is tied."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.report.table import size, table

HOOKS = Rejected("it has hooks, which a PackedLinear would lose")
PACKED = Rejected("it is packed already")
_COLUMNS = ("module", "producer", "format", "bytes", "outcome")


@dataclass(frozen=True, slots=True)
class Swap:
    """One linear, Experts module or other owner of matrices: swapped, or left as it was and why.

    Attributes:
        path: its module path.
        producer: who made it, or None.
        format: such as ``"NVFP4 group 16"``, or None.
        refusal: why it was left, or None.
        before, after: bytes of its weights: what was let go, and what is held instead.
        note: what a reader should know of one that was swapped, or None.
        experts: whether it is an Experts module.
        other: whether it is neither, but owns matrices.
    """

    path: str
    producer: str | None
    format: str | None
    refusal: str | None
    before: int = 0
    after: int = 0
    note: str | None = None
    experts: bool = False
    other: bool = False


@dataclass(frozen=True, slots=True)
class Swaps:
    """What `prepare`, `quantize` or `restore` did, one row per module with weights; ``print`` it for a table."""

    rows: tuple[Swap, ...]

    @property
    def done(self) -> tuple[Swap, ...]:
        """The linears and experts that were swapped."""
        return tuple(row for row in self.rows if row.refusal is None)

    @property
    def refused(self) -> tuple[Swap, ...]:
        """The linears and experts that were left as they were."""
        return tuple(row for row in self.rows if row.refusal is not None)

    def summary(self) -> str:
        """One line: how many were swapped, and their bytes before and after."""
        before, after = sum(row.before for row in self.done), sum(row.after for row in self.done)
        linears = [row for row in self.rows if not row.experts and not row.other]
        experts, others = [row for row in self.rows if row.experts], sum(row.other for row in self.rows)
        counts = [_count("linears", linears), *([_count("Experts modules", experts)] if experts else [])]
        left = f"; {others} other{'s' if others > 1 else ''} left" if others else ""
        return f"swapped {' and '.join(counts)}: {size(before)} -> {size(after)}{left}"

    def __str__(self) -> str:
        return f"{table([_COLUMNS, *map(_cells, self.rows)])}\n{self.summary()}"


Places = list[tuple[nn.Module, str]]


def places_of(model: nn.Module) -> dict[int, Places]:
    """Where each module stands, by its id: its parents, and its name in each."""
    places: dict[int, Places] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, name))
    return places


def place(module: nn.Module, places: Places) -> None:
    """Puts a module wherever another one stood."""
    for parent, name in places:
        parent._modules[name] = module


def untie(model: nn.Module, paths: Collection[str]) -> None:
    """Ends what a model of transformers (5.17 to 5.23) ties by name to weights of the modules at these paths.

    Its config says what it said before: that may be true of other weights.
    """
    for prefix, module in model.named_modules():
        if "all_tied_weights_keys" in vars(module):
            start, found = f"{prefix}." if prefix else "", cast(Any, module)
            own = {path.removeprefix(start) for path in paths if path.startswith(start)}
            tied = found.get_expanded_tied_weights_keys()
            if tied != (left := _without(tied, own)):
                found._tied_weights_keys = left
            found.all_tied_weights_keys = _without(found.all_tied_weights_keys, own)


def _without(tied: dict[str, str], paths: set[str]) -> dict[str, str]:
    """Sources by target; the first target of a source that is left out is the source of the others.

    A bias stays tied, as a source: that of a target ``tie_weights()`` would cut to the rows of the empty weight.
    """
    kept: dict[str, str] = {}
    heirs: dict[str, str] = {}
    for target, source in tied.items():
        (path, _, leaf), source_path = target.rpartition("."), source.rpartition(".")[0]
        if path in paths and source_path not in paths and leaf == "bias":
            kept[source] = target
        elif path not in paths:
            heir = heirs.setdefault(source, target) if source_path in paths and leaf != "bias" else source
            if heir != target:
                kept[target] = heir
    return kept


def has_hooks(module: Any) -> bool:
    """Whether calls of a module run hooks of its own, or those of accelerate."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "_hf_hook")


def _count(what: str, rows: Sequence[Swap]) -> str:
    return f"{sum(row.refusal is None for row in rows)} of {len(rows)} {what}"


def _cells(row: Swap) -> tuple[str, ...]:
    change = f"{size(row.before)} -> {size(row.after)}" if row.refusal is None else "-"
    outcome = row.refusal or ("swapped" if row.note is None else f"swapped; {row.note}")
    return row.path, row.producer or "-", row.format or "-", change, outcome
