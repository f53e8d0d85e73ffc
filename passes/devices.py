"""Which devices the ops serve."""

import torch

from marlin_w4a16.kernels.target import Target
from marlin_w4a16.passes.outcome import Rejected


def serves(device: torch.device) -> Rejected | str:
    """The kernel that runs linears of a device, or why they are left alone there."""
    if device.type == "cpu":
        return "CPU blocks"
    if device.type != "cuda":
        return Rejected(f"device {device.type}: expected cuda or cpu")
    why_not = Target.of(device).why_not
    return Rejected(why_not) if why_not else "Triton"
