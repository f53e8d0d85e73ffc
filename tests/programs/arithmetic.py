"""Weights in bfloat16 and float16: rounded once from float32, or computed in 16 bits.

R is a rounding to 16 bits; c, s and g are code, scale and global scale.
"""

from functools import partial

import torch
from torch import Tensor

from programs.factors import divisor, per_row
from programs.written import FLOAT8, by_groups, float8, written


def codes(m) -> Tensor:
    return m.values(m).to(m.dtype)


def scales(m) -> Tensor:
    return float8(m).to(m.dtype)


def factor(m) -> Tensor:
    return m.factor.to(m.dtype)


NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# By name: the decode, and how many roundings are between it and the exact value.
MULTIPLIED = {
    "c * R(s * g)": (lambda m: by_groups(codes(m), (float8(m) * m.factor).to(m.dtype)), 2),
    "c * R(s * R(g))": (lambda m: by_groups(codes(m), scales(m) * factor(m)), 3),
    "(c * s) * R(g)": (lambda m: by_groups(codes(m), scales(m)) * factor(m), 2),
    "(c * R(g)) * s": (lambda m: by_groups(codes(m) * factor(m), scales(m)), 3),
}
DIVIDED = {
    "c * R(s / g)": (lambda m: by_groups(codes(m), (float8(m) / m.factor).to(m.dtype)), 2),
    "c * R(s / R(g))": (lambda m: by_groups(codes(m), scales(m) / factor(m)), 3),
    "c * R(s * R(1 / g))": (lambda m: by_groups(codes(m), scales(m) * m.factor.reciprocal().to(m.dtype)), 3),
    "c * R(s * R(1 / R(g)))": (lambda m: by_groups(codes(m), scales(m) * factor(m).reciprocal()), 4),
    "(c * s) / R(g)": (lambda m: by_groups(codes(m), scales(m)) / factor(m), 2),
    "(c / R(g)) * s": (lambda m: by_groups(codes(m) / factor(m), scales(m)), 3),
}


def once(dtype: torch.dtype) -> list:
    """Accepted as exact."""
    form, name = partial(written, section="16-bit arithmetic", dtype=dtype), NAMES[dtype]
    return [
        form(f"{name}: cast from float32"),
        form(f"{name}: cast from float32, e8m0", scale=float8, saved={"kind": "e8m0", "factor": "none"}),
        form(f"{name}: cast from float32, a factor per row", store=per_row,
             saved={"factor": "per row"}),
        form(f"{name}: cast from float32, scale times global scale held as float32", scale=lambda m: m.scales,
             store=lambda w: {"scales": float8_of(w) * w.multiplier[:, None]}),
        form(f"{name}: c * s, no global scale", decode=lambda m: by_groups(codes(m), scales(m)),
             saved={"factor": "none"}),
        form(f"{name}: c * s, e8m0", decode=lambda m: by_groups(codes(m), scales(m)),
             saved={"kind": "e8m0", "factor": "none"}),
        form(f"{name}: c * (s * g), g a power of two", decode=lambda m: by_groups(codes(m), scales(m) * factor(m)),
             saved={"factor": "power of two"}),
    ]  # fmt: skip


def float8_of(weight) -> Tensor:
    return weight.scales.view(FLOAT8[weight.kind]).float()


def more_than_once(dtype: torch.dtype) -> list:
    """Accepted within a tolerance: half a unit in the last place for each rounding."""

    def form(name: str, decode, roundings: int, **parts):
        bound = roundings * torch.finfo(dtype).eps / 2
        expect = {"outcome": "tolerance", "tolerance": bound, "reason": "rounded"}
        name = f"{NAMES[dtype]}: {name}"
        return written(name, "16-bit arithmetic", dtype=dtype, decode=decode, expect=expect, **parts)

    multiplied = [form(name, *how) for name, how in MULTIPLIED.items()]
    divided = [form(name, *how, store=divisor) for name, how in DIVIDED.items()]
    e8m0 = form("e8m0: c * (s * R(g)), g per row", MULTIPLIED["c * R(s * R(g))"][0], 2, store=per_row,
                saved={"kind": "e8m0", "factor": "per row"})  # fmt: skip
    return [*multiplied, *divided, e8m0]


FORMS = [f for dtype in NAMES for f in (*once(dtype), *more_than_once(dtype))]
