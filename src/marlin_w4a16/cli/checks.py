"""What `doctor` thinks of the facts of a machine: pure functions from facts to checks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from marlin_w4a16.kernels.target import FP4_TENSOR_CORES, OLDEST, Target
from marlin_w4a16.report.table import size

Status = Literal["ok", "warning", "problem", "skipped"]
PYTHON, TORCH, TRITON = "3.10", "2.11", "3.6"  # the oldest that will do
SUPPORTED = "a compute capability from {}.{} to below {}.{}".format(*OLDEST, *FP4_TENSOR_CORES)
REPORT = "please report it, with what 'python -m marlin_w4a16 doctor --json' prints"
_INSTALL = "pip install marlin_w4a16, or pip install -e . in its folder: a copy on the path has no entry point"
_NO_GPU = "FP4 linears run on the CPU"
_LONGEST = 300  # letters of an error that are told
_ADVICE = (  # by what the error says, or what caused it; the first that fits
    (r"No working C\+\+ compiler|InvalidCxxCompiler", "install a C++ compiler, such as g++, or name one in CXX"),
    (r"No module named 'triton", "install triton, which there is for Linux, or run on the CPU"),
    (
        r"Failed to find C compiler|No such file or directory: '[^']*(?:cc|\+\+|clang)'",
        "install a C and a C++ compiler, such as gcc and g++, or name them in CC and CXX",
    ),
    (r"CppCompileError|CalledProcessError", "a compiler failed: are Python's headers (python3-dev) installed?"),
    (r"Invalid backend", _INSTALL),
    (r"[Oo]ut of memory", "free memory of the GPU, or choose another one by CUDA_VISIBLE_DEVICES"),
    (r"no kernel image", "install a torch that is built for this GPU"),
    (r"[Pp]txas|PTXAS", "reinstall triton, or name a ptxas of CUDA 12 or newer in TRITON_PTXAS_PATH"),
    (
        r"PermissionError|Permission denied|Read-only file system|No space left|FileNotFoundError|NotADirectoryError",
        "name folders that can be written to in TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR",
    ),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        status: ``"ok"``; ``"warning"`` where less works than could; ``"problem"`` where something is broken;
            ``"skipped"`` where there is nothing to look at.
        found, expected: for people.
        advice: what to do, or what follows; empty where nothing does.
    """

    name: str
    status: Status
    found: str
    expected: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution that one can do without; ``minimum`` is the oldest version that will do, None where any will."""

    name: str
    minimum: str | None
    purpose: str


OPTIONAL = (
    Package("transformers", "5.17", "Hugging Face's models"),
    Package("safetensors", None, "files of checkpoints"),
    Package("accelerate", None, "transformers' device_map"),
    Package("regex", None, "patterns of names in a checkpoint's config"),
    Package("compressed-tensors", None, "its nvfp4 and mxfp4 models"),
    Package("nvidia-modelopt", None, "its NVFP4 and MXFP4 models"),
    Package("torchao", None, "its NVFP4Tensor and MXTensor"),
    Package("gguf", "0.19", "GGUF files"),
    Package("diffusers", "0.42", "single files of diffusion models"),
    Package("peft", None, "adapters on FP4 models"),
    Package("rich", None, "tables in colour"),
    Package("depyf", None, "marlin_w4a16.debug"),
)


@dataclass(frozen=True, slots=True)
class Device:
    """A CUDA device as torch sees it; ``memory`` in bytes."""

    index: int
    name: str
    capability: tuple[int, int]
    memory: int

    @property
    def supported(self) -> bool:
        """Whether the Triton kernels are for it."""
        return Target(self.capability, processors=0).supported


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts.

    Attributes:
        system, architecture: as `platform` has them.
        python, torch: their versions.
        versions: those of other distributions, by name; None or no entry where not installed.
        cuda: the CUDA that torch is built for, or None.
        rocm: the ROCm that torch is built for, or None.
        driver: the newest CUDA that the NVIDIA driver takes, or None where there is no driver.
        hidden: the value of ``CUDA_VISIBLE_DEVICES``, or None where it is not set.
        devices: the CUDA devices that torch can use.
        error: why it can use none although there is a driver, or None.
    """

    system: str = "Linux"
    architecture: str = "x86_64"
    python: str = PYTHON
    torch: str = TORCH
    versions: Mapping[str, str | None] = field(default_factory=dict)
    cuda: str | None = None
    rocm: str | None = None
    driver: str | None = None
    hidden: str | None = None
    devices: tuple[Device, ...] = ()
    error: str | None = None

    @property
    def supported(self) -> tuple[Device, ...]:
        """The devices that the Triton kernels are for."""
        return tuple(device for device in self.devices if device.supported)


def check_machine(machine: Machine) -> list[Check]:
    """Every check that needs the facts alone."""
    return [
        check_version("python", machine.python, PYTHON, "install a newer Python"),
        check_platform(machine.system, machine.architecture),
        check_version("torch", machine.torch, TORCH, f"pip install --upgrade 'torch>={TORCH}'"),
        check_triton(machine),
        *(check_optional(package, machine.versions.get(package.name)) for package in OPTIONAL),
        *(check_gpu(device, machine) for device in machine.devices),
        *([] if machine.devices else [check_no_gpu(machine)]),
    ]


def older(version: str, minimum: str) -> bool:
    """Whether a version is before another; what follows its numbers, as in ``2.11.0a0+git``, is not looked at."""
    found, least = (
        [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])] for text in (version, minimum)
    )
    return found < least


def check_version(name: str, version: str, minimum: str, advice: str) -> Check:
    """A version of what nothing works without; ``advice`` is for one that is too old."""
    if older(version, minimum):
        return Check(name, "problem", version, f"{minimum} or newer", advice)
    return Check(name, "ok", version, f"{minimum} or newer")


def check_platform(system: str, architecture: str) -> Check:
    """Triton is on Linux alone."""
    found = f"{system} {architecture}"
    if system != "Linux":
        return Check("platform", "warning", found, "Linux", f"Triton's kernels run on Linux alone; here {_NO_GPU}")
    return Check("platform", "ok", found, "Linux")


def check_triton(machine: Machine) -> Check:
    """What the kernels, and Inductor on a GPU, cannot do without; a CPU can."""
    version, expected = machine.versions.get("triton"), f"{TRITON} or newer"
    if machine.system != "Linux":
        return Check("triton", "skipped", version or "not installed", f"{expected}, on Linux")
    if version is None or older(version, TRITON):
        status: Status = "problem" if machine.supported else "warning"
        needed = "" if machine.supported else "; only GPUs need it"
        advice = f"pip install --upgrade 'triton>={TRITON}'{needed}"
        return Check("triton", status, version or "not installed", expected, advice)
    return Check("triton", "ok", version, expected)


def check_optional(package: Package, version: str | None) -> Check:
    """A distribution that is missing is no fault; one that is too old will fail when it is used."""
    expected = f"{package.minimum} or newer" if package.minimum else "any version"
    if version is None:
        found = f"not installed (it is for {package.purpose})"
        return Check(package.name, "skipped", found, f"{expected}, if wanted")
    if package.minimum and older(version, package.minimum):
        advice = f"pip install --upgrade '{package.name}>={package.minimum}', to use it for {package.purpose}"
        return Check(package.name, "warning", version, expected, advice)
    return Check(package.name, "ok", version, expected)


def check_backend(names: Sequence[str]) -> Check:
    """Whether Dynamo lists the backend among the ``names`` of entry points and its own."""
    expected = "'marlin_w4a16' in torch.compiler.list_backends()"
    if "marlin_w4a16" in names:
        return Check("backend", "ok", 'torch.compile(backend="marlin_w4a16") finds it', expected)
    return Check("backend", "problem", "not found by its name", expected, _INSTALL)


def check_gpu(device: Device, machine: Machine) -> Check:
    """Whether the kernels are for a device; what follows where they are not."""
    name, (major, minor) = f"gpu {device.index}", device.capability
    found = (
        f"{device.name}, capability {major}.{minor}, {size(device.memory)}, driver for CUDA {machine.driver or '?'}, "
        f"torch for CUDA {machine.cuda}"
    )
    if device.supported:
        return Check(name, "ok", found, SUPPORTED)
    if device.capability >= FP4_TENSOR_CORES:
        advice = "it has FP4 tensor cores of its own: models on it are left as they are"
    else:
        advice = "not supported: models on it are left as they are; on the CPU they run"
    return Check(name, "warning", found, SUPPORTED, advice)


def check_no_gpu(machine: Machine) -> Check:
    """Why torch sees no device, which is no problem where there is none."""
    expected = f"{SUPPORTED}, or none"
    if machine.rocm is not None:
        found = f"torch for ROCm {machine.rocm}"
        return Check("gpu", "warning", found, expected, f"the kernels are for NVIDIA's GPUs; here {_NO_GPU}")
    if machine.driver is None:
        return Check("gpu", "skipped", "none, no NVIDIA driver", expected, _NO_GPU)
    found = f"none that torch can use, NVIDIA driver for CUDA {machine.driver}"
    if machine.cuda is None:
        advice = f"install torch for CUDA (https://pytorch.org/get-started/locally); until then {_NO_GPU}"
        return Check("gpu", "warning", f"{found}, torch without CUDA", expected, advice)
    found += f", torch for CUDA {machine.cuda}"
    if machine.error is not None and "No CUDA GPUs are available" not in machine.error:
        advice = f"update the driver, or install torch for CUDA {machine.driver} or older; until then {_NO_GPU}"
        return Check("gpu", "problem", f"{found}: {machine.error}", expected, advice)
    if machine.hidden is not None:
        advice = f"unset CUDA_VISIBLE_DEVICES, which is {machine.hidden!r}, to use one; until then {_NO_GPU}"
        return Check("gpu", "skipped", found, expected, advice)
    return Check("gpu", "skipped", found, expected, _NO_GPU)


def check_error(name: str, error: BaseException) -> Check:
    """A check that did not come to its end: what was raised, and what to do if the chain of causes tells."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    text = "\n".join(f"{type(one).__name__}: {one}" for one in chain)
    advice = next((advice for pattern, advice in _ADVICE if re.search(pattern, text)), REPORT)
    found = " ".join(f"{type(error).__name__}: {error}".partition("Set TORCHDYNAMO_VERBOSE")[0].split())
    return Check(name, "problem", found if len(found) <= _LONGEST else f"{found[:_LONGEST]} ...", "no error", advice)
