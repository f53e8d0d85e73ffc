import pytest


@pytest.fixture(autouse=True, scope="session")
def no_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def as_traced(monkeypatch) -> None:
    """Graphs run as this backend hands them to Inductor, which takes most of the time."""
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda gm, *_, **__: gm.forward)
