import argparse
import contextlib
import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import linear
from marlin_w4a16.backend import marlin_w4a16 as backend
from marlin_w4a16.cli import checks, doctor, trials
from marlin_w4a16.cli.checks import Check, Device, Machine, check_backend, check_error, check_machine, older
from marlin_w4a16.fake_impls.linear import uses_triton

CPU = torch.device("cpu")
H200 = Device(0, "NVIDIA H200", (9, 0), 140 << 30)
VERSIONS = {"triton": "3.7.1", **{package.name: "99" for package in checks.OPTIONAL}}
BARE = Machine(versions=VERSIONS)
SERVER = replace(BARE, cuda="13.0", driver="13.1", devices=(H200,))


def found(machine: Machine, name: str) -> Check:
    (check,) = [check for check in check_machine(machine) if check.name == name]
    return check


# facts


def test_a_good_machine_has_no_complaint():
    assert {check.status for check in check_machine(SERVER)} == {"ok"}
    assert {check.status for check in check_machine(BARE) if check.name != "gpu"} == {"ok"}
    names = [check.name for check in check_machine(SERVER)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "version, minimum, expected",
    [
        ("2.10.1", "2.11", True),
        ("2.11.0", "2.11", False),
        ("2.11.0a0+git1234", "2.11", False),
        ("2.9", "2.11", True),
        ("3.0", "2.11", False),
        ("5", "5.17", True),
        ("unknown", "2.11", True),
    ],
)
def test_versions_are_compared_as_numbers(version, minimum, expected):
    assert older(version, minimum) is expected


def test_the_minimums_are_those_of_the_package():
    required = {}
    for line in metadata.requires("marlin-w4a16") or []:
        name, minimum, extra = re.fullmatch(r"([\w.-]+)(?:>=([\d.]+))?(?:; .*?)?(?:extra == \"(\w+)\")?", line).groups()
        required.setdefault(extra, {})[name] = minimum
    assert required[None] == {"torch": checks.TORCH, "triton": checks.TRITON}
    assert metadata.metadata("marlin-w4a16")["Requires-Python"] == f">={checks.PYTHON}"
    optional = {package.name: package.minimum for package in checks.OPTIONAL}
    assert required["hf"].items() | required["debug"].items() <= optional.items()


@pytest.mark.parametrize("name, version", [("torch", "2.10.0+cu128"), ("python", "3.9.18")])
def test_what_nothing_works_without_is_a_problem_when_old(name, version):
    check = found(replace(SERVER, **{name: version}), name)
    assert check.status == "problem" and check.found == version and "or newer" in check.expected and check.advice


@pytest.mark.parametrize("version", [None, "3.5.1"])
def test_triton_is_a_problem_where_a_gpu_needs_it(version):
    machines = SERVER, BARE, replace(SERVER, devices=(replace(H200, capability=(7, 5)),))
    checks = [found(replace(machine, versions={**VERSIONS, "triton": version}), "triton") for machine in machines]
    assert [check.status for check in checks] == ["problem", "warning", "warning"]
    with_gpu, without, _ = checks
    assert "triton>=3.6" in with_gpu.advice and "only GPUs need it" in without.advice
    assert with_gpu.found == (version or "not installed")


def test_other_systems_have_no_triton():
    machine = Machine("Darwin", "arm64")
    assert (found(machine, "platform").status, found(machine, "triton").status) == ("warning", "skipped")
    assert "CPU" in found(machine, "platform").advice


@pytest.mark.parametrize("package", checks.OPTIONAL, ids=lambda package: package.name)
def test_a_missing_optional_package_says_what_it_is_for(package):
    check = found(replace(BARE, versions={**VERSIONS, package.name: None}), package.name)
    assert check.status == "skipped" and check.found == f"not installed (it is for {package.purpose})"


def test_an_old_optional_package_is_a_warning():
    check = found(replace(BARE, versions={**VERSIONS, "transformers": "4.57.0"}), "transformers")
    assert check.status == "warning" and "transformers>=5.17" in check.advice
    assert found(replace(BARE, versions={**VERSIONS, "peft": "0.0.1"}), "peft").status == "ok"


@pytest.mark.parametrize(
    "capability, status, words",
    [
        ((7, 5), "warning", "not supported"),
        ((8, 0), "ok", ""),
        ((8, 9), "ok", ""),
        ((9, 0), "ok", ""),
        ((10, 0), "warning", "FP4 tensor cores"),
        ((12, 0), "warning", "FP4 tensor cores"),
    ],
)
def test_a_gpu_by_its_capability(capability, status, words, monkeypatch):
    machine = replace(SERVER, devices=(replace(H200, index=2, capability=capability),))
    check = found(machine, "gpu 2")
    assert check.status == status and words in check.advice and bool(words) == bool(check.advice)
    sm = "capability {}.{}".format(*capability)
    assert check.found == f"NVIDIA H200, {sm}, 140.00 GiB, driver for CUDA 13.1, torch for CUDA 13.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert uses_triton(torch.device("cuda")) is (status == "ok") is bool(machine.supported)


DRIVER = replace(BARE, driver="12.2")
TORCH_13 = replace(DRIVER, cuda="13.0")


@pytest.mark.parametrize(
    "machine, status, words",
    [
        (BARE, "skipped", "no NVIDIA driver"),
        (replace(BARE, cuda="13.0"), "skipped", "no NVIDIA driver"),
        (replace(BARE, rocm="7.0"), "warning", "NVIDIA's GPUs"),
        (DRIVER, "warning", "install torch for CUDA"),
        (TORCH_13, "skipped", "none that torch can use, NVIDIA driver for CUDA 12.2, torch for CUDA 13.0"),
        (replace(TORCH_13, error="No CUDA GPUs are available"), "skipped", "none that torch can use"),
        (replace(TORCH_13, hidden="", error="No CUDA GPUs are available"), "skipped", "unset CUDA_VISIBLE_DEVICES"),
        (replace(TORCH_13, error="the driver is too old"), "problem", "the driver is too old"),
        (replace(TORCH_13, hidden="0", error="the driver is too old"), "problem", "torch for CUDA 12.2 or older"),
    ],
    ids=str,
)
def test_why_there_is_no_gpu(machine, status, words):
    check = found(machine, "gpu")
    assert check.status == status and words in f"{check.found}: {check.advice}"
    assert "FP4 linears run on the CPU" in check.advice


def test_the_backend_is_found_by_its_name():
    assert check_backend(["inductor", "marlin_w4a16"]).status == "ok"
    check = check_backend(["inductor"])
    assert check.status == "problem" and "pip install" in check.advice


ERRORS = {
    "C++": (RuntimeError("InductorError: InvalidCxxCompiler: No working C++ compiler found in ..."), "g++"),
    "C": (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "gcc"),
    "gcc gone": (FileNotFoundError(2, "No such file or directory", "gcc"), "install a C and a C++ compiler"),
    "g++ gone": (FileNotFoundError(2, "No such file or directory", "/usr/bin/g++"), "install a C and a C++ compiler"),
    "headers": (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), "python3-dev"),
    "cache": (
        PermissionError(13, "Permission denied", "/root/.triton"),
        "TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR",
    ),
    "disk": (OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
    "no folder": (FileNotFoundError(2, "No such file or directory", "/proc/x"), "TRITON_CACHE_DIR"),
    "backend": (RuntimeError("Invalid backend: 'marlin_w4a16', see `torch._dynamo.list_backends()`"), "pip install"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "free memory"),
    "old torch": (RuntimeError("CUDA error: no kernel image is available for execution"), "built for this GPU"),
    "ptxas": (RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
    "triton": (ModuleNotFoundError("No module named 'triton.language'"), "install triton"),
    "unknown": (RuntimeError("the moon is full"), checks.REPORT),
}


@pytest.mark.parametrize("error, advice", ERRORS.values(), ids=ERRORS)
def test_an_error_is_a_problem_with_advice(error, advice):
    check = check_error("trial", error)
    assert (check.name, check.status) == ("trial", "problem") and advice in check.advice
    assert check.found == f"{type(error).__name__}: {error}"


def test_the_cause_of_an_error_gives_the_advice():
    error = RuntimeError("backend raised\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")
    error.__cause__ = PermissionError(13, "Permission denied", "/tmp/x")
    check = check_error("trial", error)
    assert check.found == "RuntimeError: backend raised" and "TRITON_CACHE_DIR" in check.advice


def test_a_long_error_is_cut():
    check = check_error("trial", RuntimeError("x" * 5000))
    assert len(check.found) < 310 and check.found.endswith("x ...")


# the machine


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


# trials


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1.75e-3), (torch.float16, 2.3e-4)])
def test_an_error_and_its_limit(dtype, limit):
    exact = torch.randn(64, 256, dtype=torch.float64)
    rounded = exact.to(dtype)
    error, most = trials.relative_error(rounded, exact)
    assert 0.5 * limit < error <= most == limit
    assert trials.relative_error(rounded * 1.01, exact)[0] > limit
    one = torch.full((1, 1), 1 + 2.0**-9, dtype=torch.float64)  # as far from bfloat16 as can be
    error, most = trials.relative_error(one.bfloat16(), one)
    assert 1.75e-3 < error < most < 1.03 * error


@pytest.mark.parametrize("change", ["nan", "inf", "shape", "dtype"])
def test_what_is_no_result_at_all_is_infinitely_wrong(change):
    exact = torch.randn(4, 8, dtype=torch.float64)
    out = exact.bfloat16()
    if change in ("nan", "inf"):
        out[3, 7] = float(change)
    error, limit = trials.relative_error({"shape": out[:3], "dtype": out.float()}.get(change, out), exact)
    assert error == float("inf") > limit


def test_the_linears_of_this_machine_are_right():
    checks = trials.try_linears(CPU)
    assert [check.status for check in checks] == ["ok"] * 4
    assert [check.name.rsplit(",", 1)[0] for check in checks] == [
        f"{name}, {dtype}" for name in ("NVFP4 group 16", "MXFP4 group 32") for dtype in ("bfloat16", "float16")
    ]
    assert all("4 products are right" in check.found for check in checks)


WRONG = {
    "a little": lambda x, packed, bias: linear(x, packed, bias) * 1.01,
    "no bias": lambda x, packed, bias: linear(x, packed),
    "NaN": lambda x, packed, bias: linear(x, packed, bias).fill_(torch.nan),
    "float32": lambda x, packed, bias: linear(x, packed, bias).float(),
}


@pytest.mark.parametrize("op", WRONG.values(), ids=WRONG)
def test_wrong_linears_are_a_problem(op):
    assert [check.status for check in trials.try_linears(CPU, op)] == ["problem"] * 4


@pytest.mark.parametrize("m, n, k", trials.CASES)
def test_one_wrong_product_is_named(m, n, k):
    def op(x: Tensor, packed, bias) -> Tensor:
        out = linear(x, packed, bias)
        if len(x) == m and x.dtype == torch.float16:
            out[-1, -1] += 8
        return out

    right, wrong, *_ = trials.try_linears(CPU, op)
    assert right.status == "ok" and wrong.status == "problem" and wrong.advice
    assert wrong.found.startswith(f"wrong results: {m} x {k} by {n} x {k}: ") and ";" not in wrong.found


def test_a_compiled_model_is_replaced_and_right():
    check = trials.try_compiled(CPU)
    assert check.status == "ok", check
    assert check.found.startswith("replaced 1 of 1 FP4 linears (1 NVFP4 group 16; 1 CPU blocks)")


def test_a_weight_that_is_not_replaced_is_a_problem():
    check = trials.try_compiled(CPU, partial(backend, options={"exclude": "*"}))
    assert check.status == "problem" and check.found.startswith("excluded 1")


def test_a_compiled_model_that_is_wrong_is_a_problem():
    def wrong(gm, inputs):
        compiled = backend(gm, inputs)
        return lambda *args: tuple(out * 1.01 for out in compiled(*args))

    check = trials.try_compiled(CPU, wrong)
    assert check.status == "problem" and check.found.startswith("wrong result") and "replaced 1 of 1" in check.found


def test_a_backend_that_is_not_called_is_a_problem():
    check = trials.try_compiled(CPU, lambda gm, inputs: gm.forward)
    assert check.status == "problem" and "TORCH_COMPILE_DISABLE" in check.advice


def test_a_compile_leaves_the_logger_as_it_was(caplog):
    log = logging.getLogger("marlin_w4a16")
    log.setLevel(logging.ERROR)
    try:
        trials.try_compiled(CPU, lambda gm, inputs: log.info("replaced 1 of 1") or gm.forward)
        assert (log.level, log.propagate) == (logging.ERROR, True)
        assert not any(isinstance(handler, trials._Lines) for handler in log.handlers)
        assert "marlin_w4a16" not in {record.name for record in caplog.records}
    finally:
        log.setLevel(logging.NOTSET)


@pytest.fixture
def graphs(monkeypatch) -> SimpleNamespace:
    """CUDA graphs without CUDA: ``op`` is captured between the ends of the context, a replay runs it again."""
    state = SimpleNamespace(capturing=False, captured=[], replays=True)

    @contextlib.contextmanager
    def capture(graph):
        state.capturing = True
        yield
        state.capturing = False

    def op(x: Tensor, packed, bias) -> Tensor:
        out = linear(x, packed, bias)
        if state.capturing:
            state.captured.append(lambda: out.copy_(linear(x, packed, bias)))
        return out

    def replay() -> None:
        for run in state.captured if state.replays else ():
            run()

    state.op = op
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))
    return state


@pytest.mark.parametrize("replays, status", [(True, "ok"), (False, "problem")])
def test_a_replay_must_see_new_contents(graphs, replays, status):
    graphs.replays = replays
    check = trials.try_graph(CPU, graphs.op)
    assert check.status == status and len(graphs.captured) == 1


def test_triton_compiles_without_a_gpu():
    pytest.importorskip("triton")
    for capability, name in (((9, 0), "sm_90"), ((8, 0), "sm_80")):
        check = trials.try_triton(capability)
        assert (check.name, check.status) == (f"Triton for {name}", "ok") and "KiB" in check.found


# the command


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
    done = list(doctor.diagnose(SERVER, tell=True))
    (row,) = [check for check in done if check.name == "linears, cuda:0"]
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
        ["check", "status", "found"],
        ["python", "ok", "3.11"],
        ["gpu 0", "warning", "a [bold] T4; expected 8.0; buy another"],
        ["peft", "skipped", "not installed"],
        ["3 checks: 1 ok, 1 warning, 0 problem, 1 skipped"],
    ]


def test_a_problem_is_exit_code_1(diagnosed, capsys):
    assert diagnosed([*ROWS, BROKEN]) == 1
    assert "not found; expected to be found; pip install it" in capsys.readouterr().out


@pytest.mark.parametrize("rich", [True, False])
def test_a_terminal_has_colours_where_there_is_rich(diagnosed, monkeypatch, capsys, rich):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    if not rich:
        monkeypatch.setattr(doctor.util, "find_spec", lambda name: None)
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
        "name": "backend",
        "status": "problem",
        "found": "not found",
        "expected": "to be found",
        "advice": "pip install it",
    }


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
    graph = next(check for check in done if check.name.startswith("CUDA graph"))
    assert graph.status == "ok"
