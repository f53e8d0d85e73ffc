"""The torch.compile backend: ``torch.compile(model, backend="marlin_w4a16")``."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from marlin_w4a16.options import parse
from marlin_w4a16.passes.call import LiveCall
from marlin_w4a16.passes.rewrite import rewrite
from marlin_w4a16.passes.torch_private import compile_graph
from marlin_w4a16.report import Report

log = logging.getLogger("marlin_w4a16")


def marlin_w4a16(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Replaces the FP4 linears of a graph from Dynamo and hands it to Inductor.

    Found by its name, without an import, through the entry point group ``torch_dynamo_backends``.

    Args:
        gm: the traced graph.
        example_inputs: its live inputs.
        mode: a torch.compile mode.
        options: see `marlin_w4a16.options.Options`.

    Raises:
        ValueError: an unknown mode or option.
    """
    chosen = parse(mode, options)
    if not chosen.linear:
        return compile_graph(gm, example_inputs, chosen.patches)
    rewritten = rewrite(gm, example_inputs)
    report = Report(rewritten.rows)
    for row in report.rejected:
        log.debug("%s: %s", row.path, row.outcome)
    if report.owned and not (report.replaced or report.rejected):
        log.info("%s", report.summary())
        return compile_graph(gm, example_inputs, chosen.patches)
    if not report.replaced:
        why = report.summary() if report.rows else "no product of this graph has a weight made from FP4 codes"
        log.warning("nothing to replace, so the graph runs as with Inductor: %s", why)
        return compile_graph(gm, example_inputs, chosen.patches)
    log.info("%s", report.summary())
    compiled = compile_graph(rewritten.graph, rewritten.inputs, chosen.patches)
    return LiveCall(compiled, gm.forward, rewritten)
