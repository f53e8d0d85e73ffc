"""The experts of Llama 4, whose module has a forward of its own: read in transformers 5.17 to 5.24."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from marlin_w4a16.modules.transformers_experts import is_experts


class Llama4Experts(nn.Module):
    """Has what ``use_experts_implementation`` leaves on other Experts modules.

    Args:
        module: a ``Llama4TextExperts``; its parameters are this one's, too.
    """

    has_gate, has_bias, is_transposed = True, False, True

    def __init__(self, module: Any) -> None:
        super().__init__()
        self._parameters, self.act_fn = module._parameters, module.act_fn
        self.original, self.config = (module,), SimpleNamespace()  # a tuple: it is none of its children

    def _apply_gate(self, sums: Tensor) -> Tensor:
        gate, up = sums.chunk(2, dim=-1)
        activated: Tensor = up * self.act_fn(gate)
        return activated


def as_experts(module: nn.Module) -> Any:
    """An Experts module, what stands for one, or None."""
    if type(module).__name__ == "Llama4TextExperts":
        return Llama4Experts(module)
    return module if is_experts(module) else None
