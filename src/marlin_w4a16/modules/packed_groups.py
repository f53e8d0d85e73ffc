"""Stacks of linears that each take some of the rows, and own their packed weights: the experts of JetMoe."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.modules.absent import absent
from marlin_w4a16.modules.state import PackedState, held
from marlin_w4a16.report.table import size


class PackedGroups(PackedState):
    """Rows that are sorted by expert times the transposed weight of each, from weights that are held packed only.

    The rules of `PackedLinear` for packed tensors, casts and state dicts are its own.

    Args:
        weight: ``[experts, n, k]``, packed on its device.
        dtype: see `PackedLinear`.

    Raises:
        ValueError: the weight has not three dimensions, or scales that ``dtype`` cannot hold.
    """

    _empties = ("weight",)
    weight = absent("weight")

    def __init__(self, weight: FP4Weight, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if weight.multiplier.ndim != 2:
            raise ValueError(f"PackedGroups: found a weight of {weight.multiplier.ndim + 1} dimensions, expected 3")
        packed = pack(weight.fit_first(torch.float16, dtype))
        self.num_experts, self.input_size, self.output_size = len(packed.words), packed.k, packed.n
        self._own({"": packed}, {}, dtype)

    @property
    def packed(self) -> PackedFP4:
        """The weights in packed form; their tensors are the module's own."""
        return self._packed("")

    def to_fp4(self, name: str = "weight") -> FP4Weight:
        """The weights in canonical form, every code and scale byte as it was packed; ``decode()`` makes them dense."""
        return self.packed.unpack(name)

    def forward(self, inputs: Tensor, expert_size: Sequence[int] | Tensor) -> Tensor:
        """See `marlin_w4a16.grouped_linear`.

        Args:
            inputs: ``[rows, k]``, those of each expert one after the other.
            expert_size: how many rows each expert has.
        """
        packed = self._packed("") if torch.compiler.is_compiling() else self._kept("")
        offsets = torch.as_tensor(expert_size, device=inputs.device).cumsum(0)
        return self._asking(grouped_linear(inputs, packed, offsets))

    def extra_repr(self) -> str:
        """Shape, format and bytes of the packed weights."""
        format, nbytes = held(self)
        shape = f"experts={self.num_experts}, in_features={self.input_size}, out_features={self.output_size}"
        return f"{shape}, {format}, {size(nbytes)}"

    @property
    def _packing(self) -> dict[str, Any]:
        n, k, kind, group, layout = self._formats[""]
        return {"experts": self.num_experts, "layout": layout, "kind": kind, "group": group, "n": n, "k": k}
