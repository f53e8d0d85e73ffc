"""Which devices the ops serve."""

import torch

from marlin_w4a16.fake_impls.linear import uses_triton
from marlin_w4a16.passes.outcome import Rejected


def serves(device: torch.device) -> Rejected | str:
    """The kernel that runs linears of a device, or why they are left alone there."""
    if device.type == "cpu":
        return "CPU blocks"
    if device.type != "cuda":
        return Rejected(f"device {device.type}: expected cuda or cpu")
    if uses_triton(device):
        return "Triton"
    major, minor = torch.cuda.get_device_capability(device)
    why = "it has FP4 tensor cores of its own" if major >= 10 else "the kernels need 8.0"
    return Rejected(f"device of capability {major}.{minor}: {why}")
