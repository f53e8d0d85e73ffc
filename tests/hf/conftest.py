from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints.formats import write
from hf.damaged import LOADS, Damage, load
from marlin_w4a16.checkpoints.files import CheckpointError


@pytest.fixture(autouse=True, scope="session")
def no_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def as_traced(monkeypatch) -> None:
    """Graphs run as this backend hands them to Inductor, which takes most of the time."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)


@pytest.fixture
def error(monkeypatch) -> Callable[..., str]:
    """What is said of a folder that cannot be loaded; its weights are not reached."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    def said(folder: Path, **options: Any) -> str:
        with monkeypatch.context() as patched, pytest.raises(CheckpointError) as caught:
            patched.setattr(LOADS, reached)
            load(folder, **options)
        return str(caught.value)

    return said


@pytest.fixture
def damaged(tmp_path, error) -> Callable[..., str]:
    """What is said of a checkpoint after some damage."""

    def said(name: str, *changes: Damage, family: str = "llama", shards: bool = False) -> str:
        folder = write(name, family, tmp_path / "model", shards)
        for change in changes:
            change(folder)
        head, _, problems = error(folder).partition(" cannot be loaded:\n  ")
        assert head == str(folder)
        return problems

    return said
