"""Which GPU: what the ops, the passes and the tables of launches ask of a device."""

import functools
from dataclasses import dataclass

import torch

OLDEST, FP4_TENSOR_CORES = (8, 0), (10, 0)  # the kernels serve capabilities from one up to, not including, the other
# Bytes that one program can have, by capability.
SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU as the kernels see it.

    Attributes:
        capability: its compute capability.
        processors: its multiprocessors.
    """

    capability: tuple[int, int]
    processors: int

    @classmethod
    def of(cls, device: torch.device) -> "Target":
        """That of a CUDA device."""
        properties = torch.cuda.get_device_properties(device)
        return cls((properties.major, properties.minor), properties.multi_processor_count)

    @property
    def supported(self) -> bool:
        """Whether the kernels serve it."""
        return OLDEST <= self.capability < FP4_TENSOR_CORES

    @property
    def why_not(self) -> str | None:
        """Why the kernels do not serve it, or None."""
        if self.supported:
            return None
        major, minor = self.capability
        if self.capability >= FP4_TENSOR_CORES:
            why = "it has FP4 tensor cores of its own"
        else:
            why = f"the kernels need {OLDEST[0]}.{OLDEST[1]}"
        return f"device of capability {major}.{minor}: {why}"

    @property
    def hopper(self) -> bool:
        """Whether it has wgmma, which is Hopper's alone: a later capability is no Hopper."""
        return self.capability[0] == 9

    @property
    def gluon(self) -> bool:
        """Whether the Gluon kernels serve it."""
        return self.capability == (9, 0) and gluon_is_known()


def supports(device: torch.device) -> bool:
    """Whether the Triton kernels serve a device."""
    return device.type == "cuda" and Target.of(device).supported


@functools.cache
def gluon_is_known() -> bool:
    """Whether Triton is a release that the Gluon kernels are compiled under in the tests: Gluon is not stable."""
    import triton  # which there is for Linux only

    return (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 10)
