import re
import subprocess
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement

from marlin_w4a16.cli import checks
from marlin_w4a16.cli.checks import Check, Device, Machine, check_backend, check_error, check_machine, older
from marlin_w4a16.kernels.target import Target, supports

H200 = Device(0, "NVIDIA H200", (9, 0), 140 << 30)
VERSIONS = {"triton": "3.7.1", **{package.name: "99" for package in checks.OPTIONAL}}
BARE = Machine(versions=VERSIONS)
SERVER = replace(BARE, cuda="13.0", driver="13.1", devices=(H200,))


def found(machine: Machine, name: str) -> Check:
    (check,) = [check for check in check_machine(machine) if check.name == name]
    return check


def test_a_good_machine_has_no_complaint():
    assert {check.status for check in check_machine(SERVER)} == {"ok"}
    assert {check.status for check in check_machine(BARE) if check.name != "gpu"} == {"ok"}
    names = [check.name for check in check_machine(SERVER)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "version, minimum, expected",
    [
        ("2.10.1", "2.11", True), ("2.11.0", "2.11", False), ("2.11.0a0+git1234", "2.11", False),
        ("2.9", "2.11", True), ("3.0", "2.11", False), ("5", "5.17", True), ("unknown", "2.11", True),
    ],
)  # fmt: skip
def test_versions_are_compared_as_numbers(version, minimum, expected):
    assert older(version, minimum) is expected


def test_the_minimums_are_those_of_the_package():
    required = {}
    for line in metadata.requires("marlin-w4a16") or []:
        package = Requirement(line)
        minimums = [specifier.version for specifier in package.specifier if specifier.operator == ">="]
        extra = re.search(r'extra == "(\w+)"', str(package.marker or ""))
        required.setdefault(extra and extra[1], {})[package.name] = minimums[0] if minimums else None
    assert required[None] == {"torch": checks.TORCH, "triton": checks.TRITON}
    assert metadata.metadata("marlin-w4a16")["Requires-Python"] == f">={checks.PYTHON}"
    optional = {package.name: package.minimum for package in checks.OPTIONAL}
    assert all(required[extra].items() <= optional.items() for extra in ("hf", "gguf", "diffusers", "debug"))


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
        ((7, 5), "warning", "not supported"), ((8, 0), "ok", ""), ((8, 9), "ok", ""), ((9, 0), "ok", ""),
        ((10, 0), "warning", "FP4 tensor cores"), ((12, 0), "warning", "FP4 tensor cores"),
    ],
)  # fmt: skip
def test_a_gpu_by_its_capability(capability, status, words, monkeypatch):
    machine = replace(SERVER, devices=(replace(H200, index=2, capability=capability),))
    check = found(machine, "gpu 2")
    assert check.status == status and words in check.advice and bool(words) == bool(check.advice)
    sm = "capability {}.{}".format(*capability)
    assert check.found == f"NVIDIA H200, {sm}, 140.00 GiB, driver for CUDA 13.1, torch for CUDA 13.0"
    monkeypatch.setattr(Target, "of", lambda device: Target(capability, 1))
    assert supports(torch.device("cuda")) is (status == "ok") is bool(machine.supported)


DRIVER = replace(BARE, driver="12.2")
TORCH_13 = replace(DRIVER, cuda="13.0")


@pytest.mark.parametrize(
    "machine, status, words",
    [
        (BARE, "skipped", "no NVIDIA driver"), (replace(BARE, cuda="13.0"), "skipped", "no NVIDIA driver"),
        (replace(BARE, rocm="7.0"), "warning", "NVIDIA's GPUs"), (DRIVER, "warning", "install torch for CUDA"),
        (TORCH_13, "skipped", "none that torch can use, NVIDIA driver for CUDA 12.2, torch for CUDA 13.0"),
        (replace(TORCH_13, error="No CUDA GPUs are available"), "skipped", "none that torch can use"),
        (replace(TORCH_13, hidden="", error="No CUDA GPUs are available"), "skipped", "unset CUDA_VISIBLE_DEVICES"),
        (replace(TORCH_13, error="the driver is too old"), "problem", "the driver is too old"),
        (replace(TORCH_13, hidden="0", error="the driver is too old"), "problem", "torch for CUDA 12.2 or older"),
    ],
    ids=str,
)  # fmt: skip
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
    "cache": (PermissionError(13, "Permission denied", "/root/.triton"),
     "TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR"),
    "disk": (OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
    "no folder": (FileNotFoundError(2, "No such file or directory", "/proc/x"), "TRITON_CACHE_DIR"),
    "backend": (RuntimeError("Invalid backend: 'marlin_w4a16', see `torch._dynamo.list_backends()`"), "pip install"),
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "free memory"),
    "old torch": (RuntimeError("CUDA error: no kernel image is available for execution"), "built for this GPU"),
    "ptxas": (RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
    "triton": (ModuleNotFoundError("No module named 'triton.language'"), "install triton"),
    "unknown": (RuntimeError("the moon is full"), checks.REPORT),
}  # fmt: skip


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
