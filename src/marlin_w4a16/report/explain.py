"""What the backend would do to a model."""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from marlin_w4a16.options import parse
from marlin_w4a16.passes.outcome import Row
from marlin_w4a16.passes.rewrite import survey
from marlin_w4a16.report.breaks import BreakWatch
from marlin_w4a16.report.data import Report


def explain(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Traces ``model(*args, **kwargs)`` and says what the backend would do; keeps nothing packed, compiles nothing.

    The traced graphs run eagerly, once.

    Args:
        model: what would be compiled.
        args, kwargs: what it would be called with.
        options: as in ``torch.compile(options=...)``. A model that takes an ``options`` of its own is wrapped:
            ``explain(lambda *args: model(*args, options=...), *args)``.

    Raises:
        ValueError: an unknown option.
        RuntimeError: Dynamo traced nothing, so there is nothing to say.
    """
    settings = parse(None, options).settings
    graphs, watch = list[Sequence[Row]](), BreakWatch()

    def look(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        watch.look()
        graphs.append(survey(gm, inputs, settings))
        forward: Callable[..., Any] = gm.forward
        return forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo counts recompiles per code object: a fresh one leaves those of the model, and of the next explain, alone
    fresh = types.FunctionType(call.__code__.replace(), globals(), "explain", None, call.__closure__)
    torch.compile(fresh, backend=look)(*args, **kwargs)
    if not graphs:
        causes = "".join(f"\n{cause}" for cause in watch.look())
        raise RuntimeError(
            f"Dynamo traced no graph of this call: is it disabled here, or inside another trace?{causes}"
        )
    return Report(tuple(row for rows in graphs for row in rows), len(graphs), watch.look())
