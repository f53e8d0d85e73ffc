"""What stands between the products of well-known experts, as a function of their sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation

LIMIT = torch.tensor(10.0, requires_grad=True)
CLAMPED = Activation("silu", True, 1.0, 10.0, 10.0)
GPT_OSS = Activation("silu", True, 1.702, 7.0, 7.0, 1.0)


def qwen(sums: Tensor) -> Tensor:
    gate, up = sums.chunk(2, dim=-1)
    return F.silu(gate) * up


def deepseek_v4(sums: Tensor, limit: float = 10.0) -> Tensor:
    gate, up = sums.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)


def gpt_oss(sums: Tensor) -> Tensor:
    gate, up = sums[..., ::2], sums[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def watched(sums: Tensor) -> Tensor:
    """Gates up to a limit that asks for gradients, which nobody is to record, of float32 sums."""
    assert sums.dtype == torch.float32
    gate, up = sums.chunk(2, -1)
    out = F.silu(torch.minimum(gate, LIMIT)) * up
    assert not out.requires_grad
    return out
