"""Loads and inspects a spoiled checkpoint, and says what became of it."""

from __future__ import annotations

import contextlib
import io
import re
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf.dense import relative
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.cli import inspect as command
from marlin_w4a16.hf import report
from spoiled.case import Case
from spoiled.healthy import TOKENS, logits
from spoiled.theirs import is_theirs

GOOD = ("equal", "noted", "refused", "theirs")
BAD = ("raw", "hang", "silent", "unnamed", "disagrees")
OUTCOMES = (*GOOD, *BAD)
_FILE = re.compile(r"\.json|\.safetensors|in any file")
_NUMBERS = re.compile(r"\{[^{}]*\}|\d+")


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a case.

    Attributes:
        spoilers: of the case.
        outcome: ``"equal"``: it loads, and gives the logits of what its files hold; ``"noted"``: that, with a word of
            what is off; ``"refused"`` with the file and the entry; ``"theirs"``: transformers refuses what is its own;
            ``"raw"``: another exception; ``"hang"``: a step takes too long; ``"silent"``: it loads and gives others;
            ``"unnamed"``: refused without a file or an entry; ``"disagrees"``: `inspect` says something else.
        detail: what was said.
        seconds: of the longest step.
    """

    seed: int
    kind: str
    spoilers: tuple[str, ...]
    outcome: str
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading gave: logits and notes, or an error."""

    logits: Tensor | None = None
    notes: tuple[str, ...] = ()
    error: Exception | None = None


def load(folder: Path) -> Loaded:
    """Loads a folder, and runs it."""
    import transformers

    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        held = report(model)
        return Loaded(logits(model), held.notes if held is not None else ())
    except Exception as error:
        return Loaded(error=error)


def inspect(folder: Path) -> int | Exception:
    """The exit code of the command, or what it raises other than a `CheckpointError`, which the command tells."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return command.run(Namespace(path=str(folder), values=True, json=False))
        except CheckpointError:
            return 1
        except Exception as error:
            return error


def judge(case: Case, loaded: Loaded, exit_code: int | Exception, usual: tuple[str, ...]) -> tuple[str, str]:
    """The outcome, and what was said; ``usual`` are the notes of a healthy checkpoint."""
    error = loaded.error
    if isinstance(exit_code, Exception):
        return "raw", f"inspect: {_shown(exit_code)}"
    if error is None:
        far = relative(loaded.logits, expected(case))
        notes = [note for note in loaded.notes if note not in usual]
        if not far <= 1e-5:
            return "silent", f"logits differ by {far}; notes {notes}"
        if exit_code:
            return "disagrees", "it loads, but inspect refuses it"
        return ("noted", "; ".join(notes)) if notes else ("equal", "")
    if isinstance(error, CheckpointError):
        outcome = "refused" if is_named(str(error), case) else "unnamed"
    else:
        outcome = "theirs" if is_theirs(case, error) else "raw"
    if outcome == "refused" and not exit_code:
        return "disagrees", f"inspect takes it; {_shown(error)}"
    return outcome, _shown(error)


@torch.no_grad()
def expected(case: Case) -> Tensor:
    """The logits of what the files hold."""
    model: nn.Module = case.parts.healthy.model
    values = case.parts.values
    return functional_call(model, values, (TOKENS,), {"use_cache": False}).logits if values else logits(model)


def is_named(message: str, case: Case) -> bool:
    """Whether a message names a file, and an entry that was spoiled."""
    plain = _NUMBERS.sub("#", message)
    said = [[_NUMBERS.sub("#", word) for word in words if word] for words in case.words]
    return bool(_FILE.search(message)) and any(not words or any(word in plain for word in words) for words in said)


def _shown(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
