"""What was done to each FP4 weight, or why nothing was."""

import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from marlin_w4a16.passes.outcome import Owned, Rejected, Replaced, Row
from marlin_w4a16.passes.rewrite import survey


@dataclass(frozen=True, slots=True)
class Report:
    """One row per FP4 weight or near miss; ``print`` it for a table.

    Attributes:
        rows: the weights, in the order in which the model uses them.
        graphs: how many graphs Dynamo made of the model.
    """

    rows: tuple[Row, ...]
    graphs: int = 1

    @property
    def replaced(self) -> tuple[Row, ...]:
        """The weights that run as FP4 ops."""
        return tuple(row for row in self.rows if isinstance(row.outcome, Replaced))

    @property
    def owned(self) -> tuple[Row, ...]:
        """The weights of modules that own them packed."""
        return tuple(row for row in self.rows if isinstance(row.outcome, Owned))

    @property
    def rejected(self) -> tuple[Row, ...]:
        """The weights that were left as traced."""
        return tuple(row for row in self.rows if isinstance(row.outcome, Rejected))

    def summary(self) -> str:
        """One line: what was replaced, what it takes, what is packed already, what was left and why."""
        parts = []
        if self.owned:
            parts.append(f"{len(self.owned)} packed linears {_kinds(self.owned)}, {size(_packed_bytes(self.owned))}")
        if self.replaced or self.rejected or not self.owned:
            line = f"replaced {len(self.replaced)} of {len(self.replaced) + len(self.rejected)} FP4 linears"
            if self.replaced:
                line += f" {_kinds(self.replaced)}"
            if packed := _packed_bytes(self.replaced):
                line += f", packed copies of {size(packed)} beside the originals"
                if saved := sum(row.nbytes for row in self.replaced if row.producer):
                    line += f", and marlin_w4a16.prepare(model) would save {size(saved)}"
            parts.append(line)
        if self.rejected:
            reasons = Counter(row.outcome.reason for row in self.rejected if isinstance(row.outcome, Rejected))
            parts.append(f"left {len(self.rejected)}: {_counts(reasons)}")
        return "; ".join(parts)

    def __str__(self) -> str:
        return table([_COLUMNS, *(_cells(row) for row in self.rows)])


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Traces ``model(*args, **kwargs)`` and says what the backend would do; packs and compiles nothing.

    The traced graphs run eagerly, once.

    Raises:
        RuntimeError: Dynamo traced nothing, so there is nothing to say.
    """
    rows: list[Row] = []
    graphs = 0

    def look(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        rows.extend(survey(gm, inputs))
        forward: Callable[..., Any] = gm.forward
        return forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo counts recompiles per code object: a fresh one leaves those of the model, and of the next explain, alone
    fresh = types.FunctionType(call.__code__.replace(), globals(), "explain", None, call.__closure__)
    torch.compile(fresh, backend=look)(*args, **kwargs)
    if not graphs:
        raise RuntimeError("Dynamo traced no graph of this call: is it disabled here, or inside another trace?")
    return Report(tuple(rows), graphs)


_COLUMNS = ("weight", "shape", "format", "product", "outcome")


def _cells(row: Row) -> tuple[str, ...]:
    product = row.spelling if row.uses == 1 else f"{row.spelling} x {row.uses}"
    outcome = row.outcome
    text = outcome.reason if isinstance(outcome, Rejected) else f"{outcome.op} ({outcome.kernel})"
    return (row.path, f"{row.shape[0]} x {row.shape[1]}", row.format or "-", product, text)


def _kinds(rows: tuple[Row, ...]) -> str:
    kernels = Counter(row.outcome.kernel for row in rows if not isinstance(row.outcome, Rejected))
    return f"({_counts(Counter(str(row.format) for row in rows))}; {_counts(kernels)})"


def _packed_bytes(rows: tuple[Row, ...]) -> int:
    return sum(row.outcome.nbytes for row in rows if not isinstance(row.outcome, Rejected))


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Lines of cells as text in columns; the first holds their names."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def size(nbytes: int) -> str:
    """A number of bytes for people."""
    return f"{nbytes / 2**20:.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes / 2**10:.1f} KiB"
