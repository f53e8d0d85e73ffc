"""What others can see of a compile: log lines, a trace artifact, and a folder of readable code."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from marlin_w4a16.passes.graph.torch_private import trace_artifact
from marlin_w4a16.passes.outcome import Row
from marlin_w4a16.report.breaks import BreakWatch
from marlin_w4a16.report.data import Report
from marlin_w4a16.report.html import page
from marlin_w4a16.report.table import describe

log = logging.getLogger("marlin_w4a16")


@dataclass(slots=True)
class _Recorder:
    """Writes the graphs of one `debug` session, each at once, and their report at the end."""

    folder: Path
    graphs: int = 0
    rows: list[Row] = field(default_factory=list)
    watch: BreakWatch = field(default_factory=BreakWatch)

    def record(self, report: Report, traced: fx.GraphModule, rewritten: fx.GraphModule | None) -> None:
        self.watch.look()
        self.rows += report.rows
        for gm, when, what in ((traced, "before", "as Dynamo traced it"), (rewritten, "after", report.summary())):
            if gm is not None:
                code = f"# Graph {self.graphs}: {what}\n{gm.print_readable(print_output=False).rstrip()}\n"
                (self.folder / f"graph_{self.graphs}_{when}.py").write_text(code)
        self.graphs += 1

    def finish(self) -> None:
        report = Report(tuple(self.rows), self.graphs, self.watch.look())
        (self.folder / "report.json").write_text(report.to_json() + "\n")
        (self.folder / "report.html").write_text(page(report))


_ACTIVE = threading.Lock()
_RECORDER: ContextVar[_Recorder | None] = ContextVar("marlin_w4a16_debug", default=None)


@contextlib.contextmanager
def debug(dir: str | os.PathLike[str]) -> Iterator[None]:
    """Writes what ``torch.compile(backend="marlin_w4a16")`` compiles inside it as readable code.

    The files of ``depyf.prepare_debug``, and of this backend ``graph_0_before.py`` and, if something was replaced in
    it, ``graph_0_after.py`` for each graph, and ``report.json`` and ``report.html`` for all of them. Files of these
    names are overwritten. torch.compile compiles at the first call: that belongs inside, in the same thread.

    Args:
        dir: the folder; made if missing.

    Raises:
        ImportError: depyf is not installed.
        RuntimeError: another one is active.
    """
    try:
        from depyf import prepare_debug
    except ImportError as error:
        raise ImportError("debug() needs depyf: pip install 'marlin_w4a16[debug]'") from error
    recorder = _Recorder(Path(dir))
    recorder.folder.mkdir(parents=True, exist_ok=True)
    if not _ACTIVE.acquire(blocking=False):
        raise RuntimeError("debug() is active already, and depyf patches torch for the whole process")
    with contextlib.ExitStack() as stack:
        stack.callback(_ACTIVE.release)
        stack.enter_context(_warning_at_exit(prepare_debug(str(recorder.folder))))
        stack.callback(recorder.finish)
        stack.callback(_RECORDER.reset, _RECORDER.set(recorder))
        yield
    if not recorder.graphs:
        warnings.warn("nothing was compiled inside debug(): torch.compile compiles at the first call", stacklevel=3)


@contextlib.contextmanager
def _warning_at_exit(depyf: AbstractContextManager[None]) -> Iterator[None]:
    """What depyf fails to decompile at its end costs its files, not the user's program."""
    depyf.__enter__()
    try:
        yield
    finally:
        try:
            depyf.__exit__(None, None, None)
        except Exception as error:
            warnings.warn(f"depyf could not write all of its files: {type(error).__name__}: {error}", stacklevel=2)


def publish(report: Report, traced: fx.GraphModule, rewritten: fx.GraphModule | None) -> None:
    """Tells of one graph: DEBUG lines of the logger, an artifact for ``TORCH_TRACE``, and the files of `debug`.

    ``rewritten`` runs instead of the traced graph, if anything was replaced.
    """
    for row in report.rows:
        log.debug("%s", describe(row))
    for cause in report.breaks:
        log.debug("graph break: %s", cause)
    trace_artifact("marlin_w4a16_report", report.to_json)
    if recorder := _RECORDER.get():
        recorder.record(report, traced, rewritten)
