"""Why Dynamo broke a model into several graphs, and where, for people."""

import re
from dataclasses import dataclass
from traceback import FrameSummary
from typing import Any

from torch import fx

from marlin_w4a16.passes.graph.torch_private import graph_break, graph_breaks, refusals, skipped_functions

# What Dynamo calls breaks that it explains nowhere but in the count of its refusals.
_INTERNAL = {
    "step_unsupported": "a break that Dynamo cannot resume from: the rest of the function runs eagerly",
    "generic_jump": "Data-dependent branching",
}


@dataclass(frozen=True, slots=True)
class Break:
    """One cause of a graph break.

    Attributes:
        reason: Dynamo's cause.
        where: the user's line, as ``file:line in function: code``, or None where Dynamo does not say.
    """

    reason: str
    where: str | None

    def __str__(self) -> str:
        return f"{self.reason}\n  at {self.where}" if self.where else self.reason


def breaks_of(gm: fx.GraphModule) -> tuple[Break, ...]:
    """The break that ended a graph, if one did."""
    found = graph_break(gm)
    return (Break(_cause(found[0]), _place(found[1])),) if found else ()


class BreakWatch:
    """Collects the breaks of this process since it was made, each cause and place once.

    A graph tells of no break before the first operator, nor of a function that was skipped (a break in a loop). Of
    those Dynamo keeps only the last ones, so `look` is called at every graph.
    """

    def __init__(self) -> None:
        self._breaks = len(graph_breaks())
        self._skipped = skipped_functions()
        self._refusals = refusals()
        self._found: dict[Break, None] = {}

    def look(self) -> tuple[Break, ...]:
        """All breaks so far."""
        breaks, refused = graph_breaks(), refusals()
        new = list(refused - self._refusals)
        for message, frame in breaks[self._breaks :]:
            told = new[0] if message.startswith(tuple(_INTERNAL)) and len(new) == 1 else message
            self._found[Break(_cause(told), _place(frame))] = None
        for function in skipped_functions():
            if not any(function is known for known in self._skipped):
                self._found[_of_skipped(function)] = None
        self._breaks, self._refusals = len(breaks), refused
        return tuple(self._found)


def _cause(message: str) -> str:
    """The headline of one of Dynamo's messages, and the first line of its explanation."""
    headline, _, rest = message.partition("\n")
    headline = next((text for word, text in _INTERNAL.items() if headline.startswith(word)), headline)
    explanation = rest.partition("Explanation: ")[2].partition("\n")[0]
    return f"{headline}: {explanation}" if explanation else headline


def _of_skipped(function: Any) -> Break:
    cause = _cause(function.fail_reason)
    if function.fail_user_frame_lineno is None:
        return Break(cause, None)
    place = _place(FrameSummary(function.fail_user_frame_filename, function.fail_user_frame_lineno, ""))
    name = re.sub(r"^torch_dynamo_resume_in_(.*)_at_\d+$", r"the rest of \1", function.co_name)
    return Break(
        f"{cause.rstrip('.')}; so Dynamo skips {name} ({function.co_filename}:{function.co_firstlineno})", place
    )


def _place(frame: FrameSummary) -> str:
    function = f" in {frame.name}" if frame.name else ""
    return f"{frame.filename}:{frame.lineno}{function}" + (f": {frame.line}" if frame.line else "")
