"""Triton's interpreter, which has to be chosen before triton is imported: a process of its own, for many tests."""

import io
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch


def _run(calls: bytes) -> bytes:
    """In that process: ``calls`` are pairs of a name in interpreted.py and arguments."""
    from kernels import interpreted

    results = io.BytesIO()
    torch.save([getattr(interpreted, name)(*arguments) for name, arguments in _loaded(calls)], results)
    return results.getvalue()


def _loaded(saved: bytes) -> Any:
    return torch.load(io.BytesIO(saved), weights_only=False)


class Interpreter:
    """A process that lives until a call fails in it or ends it; the next call then gets a fresh one.

    What it writes to stderr is captured as that of pytest.
    """

    def __init__(self) -> None:
        self._process: ProcessPoolExecutor | None = None

    def run(self, *calls: tuple[str, tuple[Any, ...]]) -> list[Any]:
        """What functions of interpreted.py return, from pairs of a name and arguments."""
        saved = io.BytesIO()
        torch.save(calls, saved)
        try:
            return _loaded(self._submit(saved.getvalue()))
        except BaseException:
            self.close()
            raise

    def _submit(self, calls: bytes) -> bytes:
        if self._process is None:
            # every torch.empty comes filled with NaN
            fill = (torch.use_deterministic_algorithms, (True,))
            self._process = ProcessPoolExecutor(1, get_context("spawn"), *fill)
        with pytest.MonkeyPatch.context() as patch:  # the process starts at its first call
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            return self._process.submit(_run, calls).result()

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown(cancel_futures=True)
            self._process = None
