"""Checks this machine: versions, the backend's entry point, GPUs, kernels, a compiled model, a CUDA graph.

The kernels of each supported GPU, or the CPU's, are held against exact products, and a small model goes through
torch.compile. That compiles: it takes seconds, up to a minute the first time. Nothing is changed but the caches of
Triton and Inductor.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from marlin_w4a16.cli.checks import OPTIONAL, Check, Device, Machine, check_backend, check_error, check_machine
from marlin_w4a16.cli.show import show_table
from marlin_w4a16.cli.smoke import try_compiled, try_graph, try_linears, try_triton
from marlin_w4a16.report.data import Report, version_of

SCHEMA = 1
_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beside those that all commands share."""


def run(args: argparse.Namespace) -> int:
    """Prints the checks; 1 if one of them is a problem."""
    checks = list(diagnose(look(), tell=sys.stderr is not None and sys.stderr.isatty()))
    counts = Counter[str](check.status for check in checks)
    if args.json:
        print(json.dumps(as_dict(checks), indent=2))
    else:
        columns = ("check", "status", "found")
        show_table(columns, [*map(cells, checks)], style=lambda line: _STYLES[line[1]], styled=1)
        print(f"{len(checks)} checks: {', '.join(f'{counts[status]} {status}' for status in _STYLES)}")
    return 1 if counts["problem"] else 0


def look() -> Machine:
    """The facts of this machine."""
    names = ("triton", "pytorch-triton", *(package.name for package in OPTIONAL))
    versions = {name: version_of(name) for name in names}
    versions["triton"] = versions["triton"] or versions["pytorch-triton"]  # as nightly builds of torch call it
    rocm, driver = torch.version.hip, driver_version()
    devices, error = ((), None) if rocm else _devices(driver)
    system = platform.system(), platform.machine(), platform.python_version()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Machine(*system, torch.__version__, versions, torch.version.cuda, rocm, driver, hidden, devices, error)


def driver_version() -> str | None:
    """The newest CUDA that the NVIDIA driver takes, such as ``"13.0"``, or None where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        failed = cuda.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed or not version.value else f"{version.value // 1000}.{version.value % 1000 // 10}"


def steps(machine: Machine) -> Iterator[tuple[str, Callable[[], list[Check]]]]:
    """What `diagnose` does, each by the name that its error would have."""
    yield "facts", lambda: check_machine(machine)
    yield "backend", lambda: [check_backend(torch.compiler.list_backends(exclude_tags=()))]
    gpus = [torch.device("cuda", device.index) for device in machine.supported]
    for device in gpus or [torch.device("cpu")]:
        yield f"linears, {device}", partial(try_linears, device)
    if not gpus:
        for capability in ((9, 0), (8, 0)):
            name = "Triton for sm_{}{}".format(*capability)
            yield name, partial(_ahead, name, capability, machine)
    device = gpus[0] if gpus else torch.device("cpu")
    yield f"torch.compile, {device}", lambda: [try_compiled(device)]
    yield f"CUDA graph, {device}", lambda: [_graph(device)]


def diagnose(machine: Machine, tell: bool = False) -> Iterator[Check]:
    """Every check; one that raises becomes a problem with the text of the exception.

    With ``tell`` the name of each step is written to stderr as it begins.
    """
    for name, step in steps(machine):
        if tell:
            print(f"checking {name} ...", file=sys.stderr)
        try:
            yield from step()
        except Exception as error:
            yield check_error(name, error)


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """For JSON: ``schema``, ``versions``, ``problems`` (how many), and ``checks`` with the attributes of `Check`."""
    return {
        "schema": SCHEMA,
        "versions": Report.versions(),
        "problems": sum(check.status == "problem" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def cells(check: Check) -> tuple[str, str, str]:
    """A check as a line of the table; what was expected is told where something else was found."""
    parts = [check.found]
    if check.status in ("warning", "problem"):
        parts.append(f"expected {check.expected}")
    return check.name, check.status, "; ".join([*parts, *filter(None, [check.advice])])


def _ahead(name: str, capability: tuple[int, int], machine: Machine) -> list[Check]:
    if machine.versions.get("triton") is None:
        return [Check(name, "skipped", "no Triton", "machine code, no GPU needed")]
    return [try_triton(capability)]


def _graph(device: torch.device) -> Check:
    if device.type != "cuda":
        return Check(f"CUDA graph, {device}", "skipped", "no supported GPU", "a replay gives what a call gives")
    return try_graph(device)


def _devices(driver: str | None) -> tuple[tuple[Device, ...], str | None]:
    """The devices that torch can use, or why it can use none of a machine that has a driver."""
    if torch.version.cuda is None or (driver is None and not torch.cuda.is_available()):
        return (), None
    try:  # of no devices, asking for the first one says why
        found = [(i, torch.cuda.get_device_properties(i)) for i in range(max(1, torch.cuda.device_count()))]
    except Exception as error:
        return (), " ".join(str(error).split())
    return tuple(Device(i, p.name, (p.major, p.minor), p.total_memory) for i, p in found), None
