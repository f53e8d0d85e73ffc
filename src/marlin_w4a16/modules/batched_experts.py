"""Experts that are given rows in equal parts, a part for each of them: those of Llama 4."""

import torch
from torch import Tensor

from marlin_w4a16.modules.packed_experts import PackedExperts


class BatchedExperts(PackedExperts):
    """`PackedExperts` that stands where a module multiplies ``[experts, rows, hidden]`` by stacks of matrices.

    The routing weights are in its input, zeros where an expert was not chosen: those rows are left out, since without
    biases the experts make zeros of them.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """The rows ``[experts * rows, hidden]``, each through the expert of its part; of the same shape and dtype."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts = torch.arange(self.num_experts, device=flat.device).repeat_interleave(len(flat) // self.num_experts)
        chosen = torch.where((flat != 0).any(-1), experts, self.num_experts)
        return super().forward(flat, chosen[:, None], flat.new_ones((len(flat), 1))).view(hidden_states.shape)
