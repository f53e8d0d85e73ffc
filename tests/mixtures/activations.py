"""What stands between the products of well-known experts, as a function of their sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation

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
