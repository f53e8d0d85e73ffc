"""Experts of NVIDIA ModelOpt 0.47: ``mtq.compress`` packs linears only, so that none can be swapped."""

from torch import nn

from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.producers.found import is_of

_DENSE = Rejected("its weights are dense under the quantisers of ModelOpt, which compresses linears only")


def read(module: nn.Module, recover: bool) -> Rejected | None:
    """See `marlin_w4a16.producers`."""
    return _DENSE if any(is_of("modelopt", child) for child in module.modules() if child is not module) else None
