"""FP4 weights, held against each other."""

from dataclasses import fields

import torch

from marlin_w4a16 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4


def equal(a: FP4Weight | PackedFP4, b: FP4Weight | PackedFP4) -> bool:
    """Whether two are the same in every bit, whatever their names."""
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "name"]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
