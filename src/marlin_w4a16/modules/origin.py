"""Where a module that owns packed weights comes from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Origin:
    """What `restore` needs: the module that was swapped, without its weights; or why that is gone.

    Attributes:
        producer: who made it.
        module: the module.
        kept: see `marlin_w4a16.producers.found.Found`.
        nbytes: bytes of its weights.
        dtype: what its producer decodes it to.
        device: where it was.
        unfitted: scales and multiplier of a linear as they were, where packing changed them (see `FP4Weight.fit`).
        hook: what decompresses it, a `Hook` of `marlin_w4a16.producers.compressed_tensors`.
        gone: why there is no module.
    """

    producer: str
    module: nn.Module | None
    kept: Mapping[str, Any]
    nbytes: int
    dtype: torch.dtype
    device: torch.device
    unfitted: tuple[Tensor, Tensor] | None = None
    hook: Any = None
    gone: str = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        try:
            return replace(self, module=copy.deepcopy(self.module, memo), hook=copy.deepcopy(self.hook, memo))
        except Exception as error:  # modules of ModelOpt 0.47 cannot be copied
            return self._without(f"the original module could not be copied: {type(error).__name__}: {error}")

    def __reduce__(self) -> tuple[Any, ...]:
        gone = self._without("the original module is not saved with a packed one")
        return Origin, tuple(getattr(gone, f.name) for f in fields(gone))

    def _without(self, reason: str) -> "Origin":
        return Origin(self.producer, None, {}, self.nbytes, self.dtype, self.device, gone=self.gone or reason)
