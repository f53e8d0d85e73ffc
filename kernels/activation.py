"""What an expert of a mixture computes between its two products."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from marlin_w4a16.kernels.expert_order import PAIR, gates_and_ups

Function = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
FUNCTIONS: tuple[Function, ...] = get_args(Function)
# Whether a gradient passes where a number is its limit, as through torch.clamp: from torch 2.14 on it does not.
_PASSES = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


@dataclass(frozen=True, slots=True)
class Activation:
    """What stands between the two products of an expert, in float32: ``function(gate) * (up + up_offset)``.

    Attributes:
        function: ``silu`` is ``z * sigmoid(alpha * z)``, ``relu2`` the square of relu.
        gated: whether there are gates; otherwise it is ``function(z)`` of all rows.
        alpha: of silu: 1.702 in gpt-oss.
        gate_limit: gates (or z) are at most this; None for no limit.
        up_limit: ups are within plus and minus this; None for no limit.
        up_offset: what is added to the clamped ups: 1 in gpt-oss.
    """

    function: Function = "silu"
    gated: bool = True
    alpha: float = 1.0
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """The activation of gates and ups of one shape, or of z alone, in their dtype."""
        z = gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)
        value = self._function(z)
        if up is None:
            return value
        if self.up_limit is not None:
            up = up.clamp(-self.up_limit, self.up_limit)
        return value * (up + self.up_offset)

    def _function(self, z: Tensor) -> Tensor:
        if self.function == "silu":
            return z * torch.sigmoid(self.alpha * z)
        if self.function.startswith("gelu"):
            return torch.nn.functional.gelu(z, approximate="tanh" if self.function == "gelu_tanh" else "none")
        rectified = torch.relu(z)
        return rectified * rectified if self.function == "relu2" else rectified

    def of_rows(self, sums: Tensor) -> Tensor:
        """The activation of sums ``[..., rows]`` of packed rows (`expert_order`): ``[..., rows / 2]`` if gated."""
        if not self.gated:
            return self(sums)
        gate, up = gates_and_ups(sums)
        return self(gate, up).flatten(-2)

    def gradient_of_rows(self, grad: Tensor, sums: Tensor) -> Tensor:
        """The gradient of the sums of `of_rows`; in closed form, since autograd does not run inside of an op."""
        gate, up = gates_and_ups(sums) if self.gated else (sums, None)
        z = gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)
        slope = self._slope(z)
        if self.gate_limit is not None:
            slope = slope * _below(gate, self.gate_limit)
        if up is None:
            return grad * slope
        grad = grad.unflatten(-1, (-1, PAIR))
        limited = up if self.up_limit is None else up.clamp(-self.up_limit, self.up_limit)
        of_gate, of_up = grad * slope * (limited + self.up_offset), grad * self._function(z)
        if self.up_limit is not None:
            of_up = of_up * _below(up.abs(), self.up_limit)
        return torch.stack((of_gate, of_up), -2).flatten(-3)

    def _slope(self, z: Tensor) -> Tensor:
        if self.function == "silu":
            share = torch.sigmoid(self.alpha * z)
            return share * (1 + self.alpha * z * (1 - share))
        if self.function.startswith("gelu"):
            approximate = "tanh" if self.function == "gelu_tanh" else "none"
            slope: Tensor = torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate=approximate)
            return slope
        return 2 * torch.relu(z) if self.function == "relu2" else (z > 0).to(z.dtype)

    def __str__(self) -> str:
        """For people: ``silu(gate <= 7, 1.702) * (up in +-7 + 1)``."""
        of = ["gate" if self.gated else "z"]
        if self.gate_limit is not None:
            of[0] += f" <= {self.gate_limit:g}"
        if self.alpha != 1:
            of.append(f"{self.alpha:g}")
        up = "up" if self.up_limit is None else f"up in +-{self.up_limit:g}"
        up = f"({up} + {self.up_offset:g})" if self.up_offset else up
        return f"{self.function}({', '.join(of)})" + (f" * {up}" if self.gated else "")


def _below(numbers: Tensor, limit: float) -> Tensor:
    return numbers <= limit if _PASSES else numbers < limit
