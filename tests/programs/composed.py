"""Decodes put together of parts: how scales are held and read, how codes lie, where the global scale enters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from marlin_w4a16 import FP4Weight
from programs.codes import ARRANGEMENTS
from programs.scales import bits_of_e4m3, exp2, held_as, ldexp, plain, power, shift
from programs.written import FLOAT8, K, Written, by_groups, checkpoint, elements, float8

# How scales are held, None as bytes, and read.
SCALES: dict[str, list[tuple[torch.dtype | None, Callable[[Written], Tensor]]]] = {
    "e4m3": [
        (None, float8),
        (None, bits_of_e4m3),
        (torch.float8_e4m3fn, plain),
        (torch.float32, plain),
        (torch.bfloat16, plain),
        (torch.float16, plain),
    ],
    "e8m0": [
        (None, float8),
        (None, exp2),
        (None, power),
        (None, ldexp),
        (None, shift),
        (torch.float8_e8m0fnu, plain),
        (torch.float32, plain),
        (torch.bfloat16, plain),
    ],
}
# Where the global scale enters.
ORDERS = ("none", "folded", "scales", "codes", "weight", "divisor", "float")


@dataclass(frozen=True)
class Composed:
    """A way to write an FP4 linear, drawn part by part."""

    kind: str
    held: torch.dtype | None
    scale: Callable[[Written], Tensor]
    arrangement: str
    values: Callable[[Written], Tensor]
    order: str
    group: int
    n: int
    transposed: bool
    in_place: bool
    dtype: torch.dtype
    matmul: bool

    def __str__(self) -> str:
        ways = [name for name in ("transposed", "in_place", "matmul") if getattr(self, name)]
        held = str(self.held or torch.uint8).removeprefix("torch.")
        said = self.kind, self.group, held, self.arrangement, self.values.__name__, self.order, *ways
        return f"composed {' / '.join(map(str, said))} {str(self.dtype).removeprefix('torch.')}"

    def build(self) -> Written:
        fp4 = checkpoint(self.kind, self.group, self.n, K, "none" if self.order == "none" else "general")
        parts = {"store": self._store, "unpack": self._unpack, "values": self._values, "scale": self._scale}
        return Written(fp4, self.dtype, decode=self._decode, multiply=self._multiply, **parts)

    def _store(self, fp4: FP4Weight) -> dict[str, Any]:
        codes = ARRANGEMENTS[self.arrangement].pack(elements(fp4), fp4.group)
        scales = fp4.scales if self.held is None else held_as(self.held, fp4)["scales"]
        factor = fp4.multiplier[:1].clone()
        if self.order == "folded":
            scales = fp4.scales.view(FLOAT8[self.kind]).float() * factor
        if self.transposed:
            codes, scales = codes.t().contiguous(), scales.t().contiguous()
        factor = 1 / factor if self.order == "divisor" else factor
        return {"codes": codes, "scales": scales, "factor": factor.item() if self.order == "float" else factor}

    def _unpack(self, m: Written) -> Tensor:
        return ARRANGEMENTS[self.arrangement].unpack(m.codes.t() if self.transposed else m.codes, self.group)

    def _values(self, m: Written) -> Tensor:
        return self.values(m) * m.factor if self.order == "codes" else self.values(m)

    def _scale(self, m: Written) -> Tensor:
        scales = m.scales if self.order == "folded" else self.scale(m)
        scales = scales.t() if self.transposed else scales
        if self.order in ("scales", "float"):
            return scales * m.factor
        return scales / m.factor if self.order == "divisor" else scales

    def _decode(self, m: Written) -> Tensor:
        values, scales = m.values(m), m.scale(m)
        if self.in_place:
            weight = torch.empty(self.n, K)
            weight.copy_(values).view(self.n, scales.shape[1], -1).mul_(scales.unsqueeze(-1))
        else:
            weight = by_groups(values, scales)
        return (weight * m.factor if self.order == "weight" else weight).to(self.dtype)

    def _multiply(self, m: Written, weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight.T if self.matmul else linear(x, weight)
