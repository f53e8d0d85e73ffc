import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from marlin_w4a16.cli import checks, doctor, show
from marlin_w4a16.cli.checks import Check, Device, Machine

CPU = torch.device("cpu")
H200 = Device(0, "NVIDIA H200", (9, 0), 140 << 30)
VERSIONS = {"triton": "3.7.1", **{package.name: "99" for package in checks.OPTIONAL}}
BARE = Machine(versions=VERSIONS)
SERVER = replace(BARE, cuda="13.0", driver="13.1", devices=(H200,))


@pytest.fixture
def card(monkeypatch) -> SimpleNamespace:
    """A machine with a driver, a torch for CUDA and an H200; its parts can be changed."""
    parts = SimpleNamespace(driver="13.0", count=1, error=None)

    def properties(index: int) -> SimpleNamespace:
        if parts.error:
            raise RuntimeError(parts.error)
        return SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 << 30)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(doctor, "driver_version", lambda: parts.driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: parts.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: parts.count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return parts


def test_the_facts_of_a_machine(card):
    card.count = 2
    machine = doctor.look()
    assert machine.devices == (H200, replace(H200, index=1)) == machine.supported
    assert (machine.cuda, machine.rocm, machine.driver, machine.hidden) == ("13.0", None, "13.0", "0")
    assert machine.torch == torch.__version__ and machine.versions["rich"] == metadata.version("rich")
    assert (machine.error, machine.python) == (None, sys.version.split()[0])


def test_torch_says_why_it_can_use_no_device(card):
    card.count, card.error = 0, "The NVIDIA driver\non your system is too old"
    machine = doctor.look()
    assert (machine.devices, machine.error) == ((), "The NVIDIA driver on your system is too old")


@pytest.mark.parametrize("missing", ["driver", "cuda"])
def test_nothing_is_asked_where_there_is_no_cuda(card, missing, monkeypatch):
    card.count, card.error, card.driver = 0, "never asked", None if missing == "driver" else "13.0"
    monkeypatch.setattr(torch.version, "cuda", None if missing == "cuda" else "13.0")
    assert (doctor.look().devices, doctor.look().error) == ((), None)


def test_a_device_counts_where_the_driver_is_not_found(card):
    card.driver = None
    assert doctor.look().devices == (H200,)


def test_rocm_has_no_devices_for_us(card, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert doctor.look().rocm == "7.0" and not doctor.look().devices


def test_triton_by_its_other_name(monkeypatch):
    def version(name: str) -> str:
        if name != "pytorch-triton":
            raise metadata.PackageNotFoundError(name)
        return "3.8.0+git"

    monkeypatch.setattr(metadata, "version", version)
    machine = doctor.look()
    assert machine.versions["triton"] == "3.8.0+git" and machine.versions["peft"] is None


@pytest.mark.parametrize(
    "status, value, expected", [(0, 13000, "13.0"), (0, 12080, "12.8"), (0, 0, None), (3, 9, None)]
)
def test_the_version_of_the_driver(status, value, expected, monkeypatch):
    def get(pointer) -> int:
        pointer._obj.value = value
        return status

    monkeypatch.setattr(doctor.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=get))
    assert doctor.driver_version() == expected


def test_no_driver(monkeypatch):
    def fails(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(doctor.ctypes, "CDLL", fails)
    assert doctor.driver_version() is None


def names(machine: Machine) -> list[str]:
    return [name for name, _ in doctor.steps(machine)]


def test_the_steps_of_a_machine_without_a_supported_gpu():
    expected = ["facts", "backend", "linears, cpu", "Triton for sm_90", "Triton for sm_80"]
    expected += ["torch.compile, cpu", "CUDA graph, cpu"]
    assert names(BARE) == expected
    assert names(replace(SERVER, devices=(replace(H200, capability=(10, 0)),))) == expected


def test_the_steps_of_a_machine_with_gpus():
    old, second = replace(H200, capability=(7, 5)), replace(H200, index=1)
    assert names(replace(SERVER, devices=(old, second, replace(H200, index=2)))) == [
        *("facts", "backend", "linears, cuda:1", "linears, cuda:2", "torch.compile, cuda:1", "CUDA graph, cuda:1")
    ]


@pytest.fixture
def tried(monkeypatch) -> list[tuple[str, object]]:
    """Every trial is replaced by one that notes its name and argument."""
    calls: list[tuple[str, object]] = []

    def stand_in(name: str, argument: object) -> Check:
        calls.append((name, argument))
        return Check(name, "ok", "", "")

    for name in ("try_compiled", "try_graph", "try_triton"):
        monkeypatch.setattr(doctor, name, partial(stand_in, name))
    monkeypatch.setattr(doctor, "try_linears", lambda device: [stand_in("try_linears", device)])
    return calls


def test_a_gpu_is_tried(tried):
    gpu = torch.device("cuda", 0)
    assert {check.status for check in doctor.diagnose(SERVER)} == {"ok"}
    assert tried == [(f"try_{name}", gpu) for name in ("linears", "compiled", "graph")]


def test_a_cpu_is_tried(tried):
    done = list(doctor.diagnose(BARE))
    assert tried == [("try_linears", CPU), ("try_triton", (9, 0)), ("try_triton", (8, 0)), ("try_compiled", CPU)]
    assert (done[-1].name, done[-1].status) == ("CUDA graph, cpu", "skipped")


def test_no_triton_compiles_nothing(tried):
    done = list(doctor.diagnose(replace(BARE, versions={})))
    assert ("try_triton", (9, 0)) not in tried
    assert [c.status for c in done if c.name.startswith("Triton for")] == ["skipped"] * 2


def test_an_exception_of_a_check_is_a_row(tried, monkeypatch, capsys):
    def fails(device: torch.device) -> list[Check]:
        raise PermissionError(13, "Permission denied", "/root/.triton")

    monkeypatch.setattr(doctor, "try_linears", fails)
    (row,) = [check for check in list(doctor.diagnose(SERVER, tell=True)) if check.name == "linears, cuda:0"]
    assert row.status == "problem" and "/root/.triton" in row.found and "TRITON_CACHE_DIR" in row.advice
    assert [name for name, _ in tried] == ["try_compiled", "try_graph"]
    assert capsys.readouterr().err.splitlines() == [f"checking {name} ..." for name in names(SERVER)]


ROWS = [
    Check("python", "ok", "3.11", "3.10 or newer"),
    Check("gpu 0", "warning", "a [bold] T4", "8.0", "buy another"),
    Check("peft", "skipped", "not installed", "any version"),
]
BROKEN = Check("backend", "problem", "not found", "to be found", "pip install it")


@pytest.fixture
def diagnosed(monkeypatch):
    """Runs the command on given checks."""
    monkeypatch.setattr(doctor, "look", lambda: BARE)

    def run(checks: list[Check], json: bool = False) -> int:
        monkeypatch.setattr(doctor, "diagnose", lambda machine, tell: iter(checks))
        return doctor.run(argparse.Namespace(json=json, debug=False))

    return run


def test_plain_text(diagnosed, capsys):
    assert diagnosed(ROWS) == 0
    assert [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()] == [
        ["check", "status", "found"], ["python", "ok", "3.11"],
        ["gpu 0", "warning", "a [bold] T4; expected 8.0; buy another"], ["peft", "skipped", "not installed"],
        ["3 checks: 1 ok, 1 warning, 0 problem, 1 skipped"],
    ]  # fmt: skip


def test_a_problem_is_exit_code_1(diagnosed, capsys):
    assert diagnosed([*ROWS, BROKEN]) == 1
    assert "not found; expected to be found; pip install it" in capsys.readouterr().out


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_has_colours_where_there_is_rich(diagnosed, monkeypatch, capsys, rich):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    if not rich:
        monkeypatch.setattr(show.util, "find_spec", lambda name: None)
    assert diagnosed([*ROWS, BROKEN]) == 1
    out = capsys.readouterr().out
    assert ("\x1b[" in out) is rich
    assert "a [bold] T4" in out and "4 checks: 1 ok, 1 warning, 1 problem, 1 skipped" in out


def test_json(diagnosed, capsys):
    assert diagnosed([*ROWS, BROKEN], json=True) == 1
    data = json.loads(capsys.readouterr().out)
    assert [*data] == ["schema", "versions", "problems", "checks"]
    assert (data["schema"], data["problems"]) == (1, 1)
    assert set(data["versions"]) == {"marlin_w4a16", "torch", "triton", "python"}
    assert data["checks"][-1] == {
        "name": "backend", "status": "problem", "found": "not found", "expected": "to be found",
        "advice": "pip install it",
    }  # fmt: skip


def whole(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "marlin_w4a16", "doctor", *words], capture_output=True, text=True)


def test_this_machine():
    run = whole("--json")
    data = json.loads(run.stdout)
    assert (data["problems"], run.returncode) == (0, 0), run.stdout + run.stderr
    assert {check["status"] for check in data["checks"]} <= {"ok", "warning", "skipped"}
    assert sum("products are right" in check["found"] for check in data["checks"]) >= 4
    assert "Traceback" not in run.stderr


def test_a_machine_without_compiler_and_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no" / "g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    run = whole()
    assert run.returncode == 1 and "Traceback" not in run.stderr
    text = " ".join(run.stdout.split())
    if not torch.cuda.is_available():
        assert "install a C++ compiler, such as g++" in text
    assert "TRITON_CACHE_DIR" in text and str(tmp_path / "file")[:20] in text


@pytest.mark.gpu
def test_a_gpu_is_found_well():
    machine = doctor.look()
    done = list(doctor.diagnose(machine))
    assert machine.devices and machine.driver and not [check for check in done if check.status == "problem"], done
    assert next(check for check in done if check.name.startswith("CUDA graph")).status == "ok"
