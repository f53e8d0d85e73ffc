"""The torch.compile backend: ``torch.compile(model, backend="marlin_w4a16")``."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from marlin_w4a16.options import parse
from marlin_w4a16.passes.graph.integers import compile_graph
from marlin_w4a16.passes.live.call import LiveCall
from marlin_w4a16.passes.rewrite import rewrite
from marlin_w4a16.report.breaks import breaks_of
from marlin_w4a16.report.data import Report
from marlin_w4a16.report.debug import publish
from marlin_w4a16.report.table import describe

log = logging.getLogger("marlin_w4a16")


class NotReplaced(RuntimeError):
    """An FP4 weight was refused although ``strict`` asks for all of them; the message lists every refusal."""

    def __init__(self, report: Report) -> None:
        refused = "\n".join(describe(row) for row in report.rejected)
        super().__init__(
            f"strict: {len(report.rejected)} of {len(report.rows)} FP4 weights are not replaced\n{refused}"
        )


def marlin_w4a16(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Replaces the FP4 linears and mixtures of experts of a graph from Dynamo and hands it to Inductor.

    Found by its name, without an import, through the entry point group ``torch_dynamo_backends``.

    Args:
        gm: the traced graph.
        example_inputs: its live inputs.
        mode: a torch.compile mode.
        options: see `marlin_w4a16.options.Options`.

    Raises:
        ValueError: an unknown mode or option.
        NotReplaced: with the option ``strict``, an FP4 weight was refused.
    """
    chosen = parse(mode, options)
    if not (chosen.linear or chosen.moe or chosen.grouped):
        return compile_graph(gm, example_inputs, chosen.patches)
    rewritten = rewrite(gm, example_inputs, chosen.settings)
    report = Report(rewritten.rows, breaks=breaks_of(gm))
    publish(report, gm, rewritten.graph if report.replaced else None)
    if chosen.strict and report.rejected:
        raise NotReplaced(report)
    if report.replaced or (report.rows and not report.rejected):
        log.info("%s", report.summary())
    else:
        why = report.summary() if report.rows else "no product of this graph has a weight made from FP4 codes"
        is_piece = bool(report.breaks) and not report.rows  # what Dynamo's graph breaks leave, such as cache updates
        level = logging.INFO if is_piece else logging.WARNING
        log.log(level, "nothing to replace, so the graph runs as with Inductor: %s", why)
    if not report.replaced:
        return compile_graph(gm, example_inputs, chosen.patches)
    patches = {"emulate_precision_casts": True} | chosen.patches if rewritten.rounds else chosen.patches
    compiled = compile_graph(rewritten.graph, rewritten.inputs, patches)
    return LiveCall(compiled, gm.forward, rewritten).__call__  # depyf looks for the code of a function
