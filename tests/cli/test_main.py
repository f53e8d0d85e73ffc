import argparse
import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

from marlin_w4a16.__main__ import COMMANDS, main


@pytest.fixture
def command(monkeypatch) -> ModuleType:
    """A stand-in for ``bench``: takes ``path`` and ``--rows``, keeps its arguments, and returns or raises ``gives``."""
    module = ModuleType("marlin_w4a16.cli.bench", "Weighs a checkpoint.\n\nTwice.")

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("path")
        parser.add_argument("--rows", type=int, default=3)

    def run(args: argparse.Namespace) -> int:
        module.args = args
        if isinstance(module.gives, BaseException):
            raise module.gives
        return module.gives

    module.add_arguments, module.run, module.gives = add_arguments, run, 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def python(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


@pytest.mark.parametrize("code", [0, 1])
def test_a_command_gets_its_arguments_and_gives_the_exit_code(command, code):
    command.gives = code
    assert main(["bench", "folder", "--rows", "5"]) == code
    assert vars(command.args) == {"path": "folder", "rows": 5, "json": False, "debug": False}


def test_every_command_has_json_and_debug(command):
    assert main(["bench", "--json", "folder", "--debug"]) == 0
    assert command.args.json and command.args.debug and command.args.rows == 3


def test_the_words_are_those_of_the_process(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["marlin_w4a16", "bench", "folder"])
    assert main() == 0 and command.args.path == "folder"


@pytest.mark.parametrize(
    "words",
    [
        [], ["benhc"], ["bench"], ["bench", "folder", "more"], ["bench", "folder", "--row", "5"],
        ["--json", "bench", "folder"], ["--vers"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_is_2_with_the_usage(command, words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("usage: python -m marlin_w4a16")


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("no FP4 weight in it"), "no FP4 weight in it"), (ValueError("one\n  two"), "one two"),
        (ValueError(), "ValueError"), (OSError("disk on fire"), "disk on fire"),
        (FileNotFoundError(2, "No such file or directory", "folder"), "folder: No such file or directory"),
        (ImportError("bench needs transformers: pip install transformers"),) * 2,
    ],
    ids=repr,
)  # fmt: skip
def test_an_error_of_the_user_is_one_line(command, error, line, capsys):
    command.gives = error
    assert main(["bench", "folder"]) == 1
    assert capsys.readouterr() == ("", f"marlin_w4a16 bench: error: {line}\n")


def test_debug_shows_the_traceback(command):
    command.gives = ValueError("no FP4 weight in it")
    with pytest.raises(ValueError, match="no FP4 weight"):
        main(["bench", "folder", "--debug"])


def test_an_error_of_ours_is_never_hidden(command):
    command.gives = KeyError("lost")
    with pytest.raises(KeyError):
        main(["bench", "folder"])


def test_an_interrupted_command_is_130_without_a_traceback(command, capsys):
    command.gives = KeyboardInterrupt()
    assert main(["bench", "folder", "--debug"]) == 130
    assert capsys.readouterr() == ("", "marlin_w4a16 bench: interrupted\n")


def test_a_command_that_cannot_be_imported_is_an_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "marlin_w4a16.cli.bench", None)
    assert main(["bench", "folder"]) == 1
    assert "marlin_w4a16 bench: error: import of marlin_w4a16.cli.bench halted" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert all(f"{name} " in text and words in text for name, words in COMMANDS.items())
    assert "exit codes: 0" in text


def test_the_help_of_a_command_is_its_docstring(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "Weighs a checkpoint.\n\nTwice." in text and "--rows" in text and "exit codes: 0" in text


def test_version(capsys):
    import marlin_w4a16

    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"marlin_w4a16 {marlin_w4a16.__version__}\n"


LOADED = """
import json, sys
from marlin_w4a16.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
import torch
print("\\n" + json.dumps([*sys.modules]), torch.cuda.is_initialized(), sep="\\n")
"""


def test_help_loads_no_command_and_touches_no_gpu():
    """The package itself imports torch, so Python has that; what is slow or a device's it has not."""
    run = python(LOADED, "--help")
    *_, modules, initialized = run.stdout.splitlines()
    loaded = set(json.loads(modules))
    slow = {"torch._dynamo", "torch._inductor", "triton", "transformers", "rich"}
    assert not loaded & slow and not any(name.startswith("marlin_w4a16.cli.") for name in loaded)
    assert initialized == "False", run.stderr


def test_a_command_loads_no_other():
    run = python(LOADED, "doctor", "--help")
    loaded = set(json.loads(run.stdout.splitlines()[-2]))
    assert {f"marlin_w4a16.cli.{name}" for name in COMMANDS} & loaded == {"marlin_w4a16.cli.doctor"}, run.stderr


def test_serve_hands_every_argument_to_transformers_with_the_plugin(monkeypatch):
    from transformers.cli import transformers as cli
    from transformers.quantizers import auto

    handed = []
    monkeypatch.setattr(cli, "app", lambda words, **_: handed.append((words, auto.AUTO_QUANTIZER_MAPPING["modelopt"])))
    assert main(["serve", "--port", "80", "folder", "--compile", "--device=cpu"]) == 0
    [(words, quantizer)] = handed
    assert words == ["serve", "--port", "80", "folder", "--compile", "--device=cpu"]
    assert quantizer.__module__ == "marlin_w4a16.hf.quantizer"


def test_serve_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr("transformers.cli.serve.is_serve_available", lambda: False)
    assert main(["serve", "folder"]) == 1
    assert "marlin_w4a16 serve: error: Missing dependencies for serving. Install with" in capsys.readouterr().err


def test_an_option_that_serve_of_transformers_lacks_is_2(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["serve", "folder", "--nothing"])
    assert exit.value.code == 2 and "--nothing" in capsys.readouterr().err


def test_python_m_runs_it():
    run = subprocess.run([sys.executable, "-m", "marlin_w4a16", "nothing"], capture_output=True, text=True)
    assert run.returncode == 2 and "choose from" in run.stderr


def test_a_reader_that_leaves_is_no_error():
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    code = """
import os, sys, types
from marlin_w4a16.__main__ import main
command = types.ModuleType("bench")
command.add_arguments, command.run = (lambda parser: None), (lambda args: print("table") or 0)
sys.modules["marlin_w4a16.cli.bench"] = command
end, sys_stdout = os.pipe()
os.close(end)
os.dup2(sys_stdout, sys.stdout.fileno())
sys.exit(main(["bench"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=buffered)
    assert (run.returncode, run.stderr) == (1, "")
