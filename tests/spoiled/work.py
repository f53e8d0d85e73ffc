"""Runs cases in a process of its own, which is ended where a step takes too long, or memory."""

from __future__ import annotations

import functools
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from spoiled.case import generate
from spoiled.healthy import KINDS, healthy
from spoiled.run import Result, inspect, judge, load

LIMIT = 5.0  # seconds of a step
_WRITING = 60.0  # seconds, of the spoilers
_MEMORY = 6 << 30  # bytes that a process may have beside those at its start


def run(seeds: Iterable[int]) -> Iterator[Result]:
    """What becomes of the cases of some seeds, in one process after the other."""
    quiet()
    for kind in KINDS:
        usual(kind)
    worker: _Worker | None = None
    for seed in seeds:
        worker = worker or _Worker()
        result = worker.result(seed)
        if result.outcome == "hang":
            worker = worker.end()
        yield result
    if worker is not None:
        worker.end()


def quiet() -> None:
    """One thread, no bars and no word of what is loaded, nothing from the hub."""
    import logging
    import warnings

    import huggingface_hub.constants
    from transformers.utils import logging as of_transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("marlin_w4a16").setLevel(logging.CRITICAL)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    of_transformers.disable_progress_bar()
    huggingface_hub.constants.HF_HUB_OFFLINE = True


@functools.cache
def usual(kind: str) -> tuple[str, ...]:
    """The notes of a healthy checkpoint."""
    loaded = load(healthy(kind).folder)
    if loaded.error is not None:
        raise loaded.error
    return loaded.notes


class _Worker:
    """A fork, which has all that is imported and all healthy checkpoints."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._mine, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def result(self, seed: int) -> Result:
        """Of a case; a hang where a step is not over in time, or the process dies of it."""
        self._mine.send(seed)
        step, limit = "writing", _WRITING
        while True:
            try:
                if not self._mine.poll(limit):
                    return self._hang(seed, f"{step} took more than {limit} s")
                said = self._mine.recv()
            except EOFError:
                return self._hang(seed, f"the process died while {step}")
            if isinstance(said, Result):
                return said
            step, limit = said, LIMIT

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _hang(self, seed: int, detail: str) -> Result:
        case = generate(seed)
        return Result(seed, case.kind, case.spoilers, "hang", detail)


def _work(connection: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    while True:
        connection.send(_result(connection.recv(), connection.send))


def _result(seed: int, say: Any) -> Result:
    case = generate(seed)
    folder = Path(tempfile.mkdtemp(prefix=f"spoiled-{seed}-"))
    try:
        case.parts.write(folder)
        say("loading")
        start = time.monotonic()
        loaded = load(folder)
        middle = time.monotonic()
        say("inspecting")
        code = inspect(folder)
        seconds = max(middle - start, time.monotonic() - middle)
        say("judging")
        return Result(seed, case.kind, case.spoilers, *judge(case, loaded, code, usual(case.kind)), seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
