"""What was done to each FP4 weight, or why nothing was."""

import json
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from marlin_w4a16.passes.outcome import Excluded, Owned, Rejected, Replaced, Row
from marlin_w4a16.report.breaks import Break
from marlin_w4a16.report.html import fragment
from marlin_w4a16.report.table import COLUMNS, WORDS, collapse, packed_bytes, size, table, word
from marlin_w4a16.version import __version__

SCHEMA = 1
_MOST = 4


@dataclass(frozen=True, slots=True)
class Report:
    """One row per FP4 weight or near miss.

    ``print`` it for a table in which equal rows of many layers stand as one, ``rich.print`` it for one with colours;
    a notebook shows every row.

    Attributes:
        rows: the weights, in the order in which the model uses them.
        graphs: how many graphs Dynamo made of the model.
        breaks: why there is more than one, each cause and place once.
    """

    rows: tuple[Row, ...]
    graphs: int = 1
    breaks: tuple[Break, ...] = ()

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

    @property
    def excluded(self) -> tuple[Row, ...]:
        """The weights that were left as traced because the options say so."""
        return tuple(row for row in self.rows if isinstance(row.outcome, Excluded))

    def summary(self) -> str:
        """One line: what was replaced, what it takes, what is packed already, what was left and why."""
        parts = []
        if linears := [row for row in self.owned if not row.stacked]:
            parts.append(f"{len(linears)} packed linears {_kinds(linears)}, {size(_packed_bytes(linears))}")
        if stacks := [row for row in self.owned if row.stacked]:
            parts.append(f"{len(stacks)} packed stacks of experts {_kinds(stacks)}, {size(_packed_bytes(stacks))}")
        if self.replaced or self.rejected or not (self.owned or self.excluded):
            line = f"replaced {self._replaced()}"
            if packed := _packed_bytes(self.replaced):
                line += f", packed copies of {size(packed)} beside the originals"
                if saved := sum(row.nbytes for row in self.replaced if row.producer):
                    line += f", and marlin_w4a16.prepare(model) would save {size(saved)}"
            parts.append(line)
        outcomes = [row.outcome for row in self.rows]
        replaced = [outcome for outcome in outcomes if isinstance(outcome, Replaced)]
        if notes := Counter(outcome.note for outcome in replaced if outcome.note):
            parts.append(_counts(notes))
        if errors := [outcome.error for outcome in replaced if outcome.error is not None]:
            parts.append(f"worst error of verify {max(errors):.1e}")
        if self.rejected:
            refused = [outcome for outcome in outcomes if isinstance(outcome, Rejected)]
            whys = Counter(outcome.why for outcome in refused)
            reasons = Counter(one.reason if whys[one.why] == 1 else one.why for one in refused)
            parts.append(f"left {len(self.rejected)}: {_counts(reasons)}")
        if self.excluded:
            parts.append(f"excluded {len(self.excluded)}")
        return "; ".join(parts)

    def _replaced(self) -> str:
        """How many linears, and how many stacks of experts, of how many."""
        told = []
        for name, stacked in (("FP4 linears", False), ("stacks of FP4 matrices", True)):
            replaced = [row for row in self.replaced if row.stacked == stacked]
            rejected = [row for row in self.rejected if row.stacked == stacked]
            if replaced or rejected:
                kinds = f" {_kinds(replaced)}" if replaced else ""
                told.append(f"{len(replaced)} of {len(replaced) + len(rejected)} {name}{kinds}")
        return " and ".join(told) or "0 of 0 FP4 linears"

    def totals(self) -> dict[str, int]:
        """Numbers of weights by outcome, and bytes of the originals, packed, and of all weights as bfloat16."""
        counts = Counter(map(word, self.rows))
        return {
            "weights": len(self.rows),
            **{name: counts[name] for name in WORDS.values()},
            "bytes": sum(row.nbytes for row in self.rows),
            "packed_bytes": _packed_bytes(self.rows),
            "bf16_bytes": sum(2 * math.prod(row.shape) for row in self.rows),
        }

    def figures(self) -> dict[str, str]:
        """The totals that are not zero, for people."""
        totals = self.totals()
        counts = {name: str(totals[name]) for name in WORDS.values() if totals[name]}
        sizes = {"original": "bytes", "packed": "packed_bytes", "as bfloat16": "bf16_bytes"}
        return counts | {name: size(totals[key]) for name, key in sizes.items() if totals[key]}

    def total_line(self) -> str:
        """One line: the weights, the graphs and the `figures`."""
        graphs = f"{self.graphs} graph{'s' if self.graphs != 1 else ''}"
        if not self.rows:
            return f"no product of {graphs} has a weight made from FP4 codes"
        weights = f"{len(self.rows)} weight{'s' if len(self.rows) != 1 else ''}"
        return f"{weights} in {graphs}: {', '.join(f'{value} {name}' for name, value in self.figures().items())}"

    @staticmethod
    def versions() -> dict[str, str | None]:
        """What a bug report should name; None for a package that is not installed."""
        found = {"marlin_w4a16": __version__, "torch": torch.__version__, "triton": version_of("triton")}
        return {**found, "python": platform.python_version()}

    def to_json(self) -> str:
        """All of it, every row, by the schema in docs/report.md."""
        values = {
            "schema": SCHEMA,
            "versions": self.versions(),
            "graphs": self.graphs,
            "breaks": [asdict(cause) for cause in self.breaks],
            "totals": self.totals(),
            "weights": [_weight(row) for row in self.rows],
        }
        return json.dumps(values, indent=2)

    def __str__(self) -> str:
        lines = [COLUMNS, *(line.cells for line in collapse(self.rows))]
        breaks = [f"graph break: {cause}" for cause in self.breaks]
        return "\n".join([*([table(lines)] if self.rows else []), *breaks, self.total_line()])

    def __rich__(self) -> Any:
        from marlin_w4a16.report.terminal import rich_report

        return rich_report(self)

    def _repr_html_(self) -> str:
        return fragment(self)


def version_of(package: str) -> str | None:
    """The version of a package, or None: it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _weight(row: Row) -> dict[str, Any]:
    outcome = row.outcome
    group = row.format.rpartition(" group ")[2] if row.format else None
    return {
        "path": row.path,
        "form": row.spelling,
        "shape": list(row.shape[-2:]),
        "matrices": row.shape[0] if row.stacked else 1,
        "format": row.format,
        "group": int(group) if group else None,
        "outcome": word(row),
        "experts": row.experts and asdict(row.experts),
        **{name: getattr(outcome, name, None) for name in ("op", "kernel", "reason")},
        "note": getattr(outcome, "told", None),
        "error": getattr(outcome, "error", None),
        "bytes": row.nbytes,
        "packed_bytes": getattr(outcome, "nbytes", None),
        "uses": row.uses,
        "producer": row.producer,
    }


def _kinds(rows: Sequence[Row]) -> str:
    kernels = Counter(row.outcome.kernel for row in rows if isinstance(row.outcome, Replaced | Owned))
    mixtures = Counter(f"in whole mixtures: {row.experts}" for row in rows if row.experts is not None)
    told = [_counts(Counter(str(row.format) for row in rows)), _counts(kernels), _counts(mixtures)]
    return f"({'; '.join(filter(None, told))})"


def _packed_bytes(rows: Sequence[Row]) -> int:
    return sum(map(packed_bytes, rows))


def _counts(counter: Counter[str]) -> str:
    """The most common names and how many others there are: a reason may tell one weight apart from all others."""
    most = counter.most_common(_MOST)
    others = counter.total() - sum(count for _, count in most)
    return ", ".join([*(f"{count} {name}" for name, count in most), *([f"{others} others"] if others else [])])
