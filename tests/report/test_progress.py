import gc
import io
import sys
import weakref
from collections.abc import Callable

import pytest
from torch import nn

from marlin_w4a16 import prepare, quantize
from marlin_w4a16.report.progress import track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def look(monkeypatch) -> Callable[[], Terminal]:
    """Makes stderr a terminal from now on: pytest sets it anew between a fixture and its test."""
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)

    def looked() -> Terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return looked


@pytest.mark.parametrize("show", [None, False])
def test_there_is_no_bar_where_nobody_looks(capsys, show):
    assert list(track([1, 2, 3], "packing", show=show)) == [1, 2, 3] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("show", [None, True])
def test_there_is_one_on_a_terminal(look, capsys, show):
    terminal = look()
    assert list(track([1, 2, 3], "packing", show=show)) == [1, 2, 3]
    assert "packing" in terminal.getvalue() and "3/3" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_terminal_can_be_left_alone(look):
    terminal = look()
    assert list(track([1, 2, 3], "packing", show=False)) == [1, 2, 3] and terminal.getvalue() == ""


def test_a_bar_that_is_asked_for_needs_no_terminal(capsys):
    assert list(track([1, 2, 3], "packing", show=True)) == [1, 2, 3] and "packing" in capsys.readouterr().err


def test_items_that_cannot_be_counted(look):
    terminal = look()
    assert list(track((i for i in range(3)), "packing")) == [0, 1, 2] and "3/?" in terminal.getvalue()


@pytest.mark.parametrize("show", [None, True])
def test_without_rich_there_is_none(monkeypatch, look, show):
    terminal = look()
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert list(track([1, 2, 3], "packing", show=show)) == [1, 2, 3] and terminal.getvalue() == ""


def test_without_stderr_there_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track([1, 2, 3], "packing")) == [1, 2, 3]


@pytest.mark.parametrize("show", [False, True])
def test_an_item_is_not_held_back(look, show):
    look()
    gone = []

    def items():
        for _ in range(3):
            item = nn.Module()
            gone.append(weakref.ref(item))
            yield item
            del item
            assert gone[-1]() is None

    gc.disable()
    try:
        for item in track(items(), "packing", show=show):
            del item
    finally:
        gc.enable()
    assert len(gone) == 3


@pytest.mark.parametrize("stop", [StopAsyncIteration, None])
def test_the_streams_are_left_alone_and_it_ends_with_the_loop(look, stop):
    terminal = look()
    stdout = sys.stdout
    try:
        for _ in track([1, 2, 3], "packing"):
            assert sys.stderr is terminal and sys.stdout is stdout
            if stop:
                raise stop
            break
    except StopAsyncIteration:
        pass
    shown = terminal.getvalue()
    assert "0/3" in shown and shown.endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("call", [lambda model, **kw: quantize(model, "nvfp4", **kw), prepare])
def test_quantize_and_prepare_have_one(look, call):
    terminal = look()
    model = nn.Sequential(nn.Linear(64, 64))
    call(model, progress=False)
    assert terminal.getvalue() == ""
    call(model)
    assert "quantising to nvfp4" in terminal.getvalue() or "packing" in terminal.getvalue()
