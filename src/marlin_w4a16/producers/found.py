"""What a producer's module holds, and what the file of a producer can do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.passes.outcome import Rejected

NO_VALUES = Rejected("its weight holds no values: it is on the meta device")


@dataclass(frozen=True, slots=True)
class FoundModule:
    """An FP4 linear, or FP4 experts, as their producer left them.

    Attributes:
        weights: that of a linear; of experts the first product, ``[experts, rows, hidden]``, and the second one,
            ``[experts, hidden, intermediate]``.
        dtype: what its producer decodes it to.
        nbytes: bytes of the tensors that ``strip`` lets go.
        kept: what ``strip`` and ``fill`` need beside the module and the weight; no large tensors.
        activations: how the producer quantises the input, or None.
    """

    weights: tuple[FP4Weight, ...]
    dtype: torch.dtype
    nbytes: int
    kept: Mapping[str, Any]
    activations: str | None = None


class Producer(Protocol):
    """Reads the modules of a producer, lets their weights go, and gives them back."""

    def read(self, module: Any, recover: bool) -> FoundModule | Rejected | None:
        """What a module holds; None: it is not of this producer.

        ``recover`` allows a dense weight to be read back as the codes it was decoded from.
        """

    def strip(self, module: Any, kept: Mapping[str, Any]) -> None:
        """Lets the weights of a module go; the rest of it stays."""

    def fill(self, module: Any, weight: Any, kept: Mapping[str, Any]) -> None:
        """The inverse of `strip`, bit for bit, on the weight's device; experts take a pair of weights."""


def is_of(package: str, value: object) -> bool:
    """Whether a value's class comes from a package, which need not be installed."""
    return type(value).__module__.partition(".")[0] == package


def is_linear(cls: type[nn.Module]) -> bool:
    """Whether modules of a class compute what ``nn.Linear`` computes."""
    return issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward


def holds_values(*tensors: Tensor | None) -> bool:
    """Whether tensors are on a device that holds values, not on ``meta``."""
    return not any(t is not None and t.is_meta for t in tensors)


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def factors_of(weight: FP4Weight) -> Tensor:
    """The one factor of all rows of each matrix ``[...]``, float32.

    Raises:
        ValueError: rows of a matrix have different ones, which no producer can hold.
    """
    factors = weight.multiplier[..., 0].clone(memory_format=torch.contiguous_format)
    if bool((weight.multiplier != factors.unsqueeze(-1)).any()):
        raise ValueError(f"{weight.name}: found a multiplier per row, expected one for all")
    return factors
