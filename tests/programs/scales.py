"""What the scales of the groups are held as."""

from functools import partial

import torch
from torch import Tensor

from marlin_w4a16 import FP4Weight
from programs.written import FLOAT8, float8, written

E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


def held_as(dtype: torch.dtype, weight: FP4Weight) -> dict:
    return {"scales": weight.scales.view(FLOAT8[weight.kind]).to(dtype)}


def held_as_float8(weight: FP4Weight) -> dict:
    return {"scales": weight.scales.view(FLOAT8[weight.kind])}


def folded(dtype: torch.dtype, weight: FP4Weight) -> dict:
    """Scale times global scale, once for each group."""
    return {"scales": (weight.scales.view(FLOAT8[weight.kind]).float() * weight.multiplier[:, None]).to(dtype)}


def reciprocal(weight: FP4Weight) -> dict:
    """What values are divided by."""
    return {"scales": 1 / folded(torch.float32, weight)["scales"]}


def held_as_e5m2(weight: FP4Weight) -> dict:
    """Scales of two bits that E4M3 holds too."""
    scales = (torch.rand(weight.scales.shape) + 0.5).to(torch.float8_e5m2)
    weight.scales.copy_(scales.to(torch.float8_e4m3fn).view(torch.uint8))
    return {"scales": scales}


def plain(m) -> Tensor:
    return m.scales.float()


def exp2(m) -> Tensor:
    return torch.exp2(m.scales.float() - 127)


def power(m) -> Tensor:
    return 2.0 ** (m.scales.int() - 127)


def ldexp(m) -> Tensor:
    return torch.ldexp(torch.ones_like(m.scales, dtype=torch.float32), m.scales.int() - 127)


def shift(m) -> Tensor:
    return (m.scales.int() << 23).view(torch.float32)


def bits_of_e4m3(m) -> Tensor:
    """Sign, exponent and mantissa, subnormals included."""
    bits = m.scales.int()
    exponent, mantissa = bits >> 3 & 15, bits & 7
    return torch.where(exponent == 0, mantissa * 2.0**-9, torch.ldexp(1 + mantissa / 8, exponent - 7))


form = partial(written, section="scales")
e8m0 = partial(form, saved={"kind": "e8m0", "factor": "none"})
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
NO_BYTE = {"outcome": "refused", "reason": "block scales are not"}
FORMS = [
    form("e4m3 as float8_e4m3fn", store=held_as_float8, scale=lambda m: m.scales.float() * m.factor),
    form("e4m3 as uint8, viewed"),
    form("e4m3 as uint8, by a table of 256", scale=lambda m: m.table[m.scales.int()] * m.factor,
         store=lambda w: {"table": E4M3.clone()}),
    form("e4m3 as uint8, by its bits", scale=lambda m: bits_of_e4m3(m) * m.factor),
    *(form(f"e4m3 as {name}", store=partial(held_as, dtype), scale=lambda m: m.scales.float() * m.factor)
      for dtype, name in NAMES.items()),
    form("e4m3 as float8_e5m2, where exact", store=held_as_e5m2, scale=lambda m: m.scales.float() * m.factor),
    form("e4m3 in groups of 32", saved={"group": 32}),
    form("e4m3 without a global scale", scale=float8, saved={"factor": "none"}),
    e8m0("e8m0 as float8_e8m0fnu", store=held_as_float8, scale=plain),
    e8m0("e8m0 as uint8, viewed", scale=float8),
    e8m0("e8m0 as uint8, exp2", scale=exp2),
    e8m0("e8m0 as uint8, 2.0 ** n", scale=power),
    e8m0("e8m0 as uint8, ldexp", scale=ldexp),
    e8m0("e8m0 as uint8, shifted 23 bits and viewed as float32", scale=shift),
    e8m0("e8m0 as uint8, shifted 7 bits and viewed as bfloat16",
         scale=lambda m: (m.scales.to(torch.int16) << 7).view(torch.bfloat16).float()),
    e8m0("e8m0 as int8 exponents without a bias", scale=lambda m: torch.exp2(m.scales.float()),
         store=lambda w: {"scales": (w.scales.int() - 127).to(torch.int8)}),
    *(e8m0(f"e8m0 as {name}", store=partial(held_as, dtype), scale=plain) for dtype, name in NAMES.items()),
    form("e8m0 in groups of 16", scale=float8, saved={"kind": "e8m0", "group": 16, "factor": "none"}),
    form("e8m0 with a global scale", scale=lambda m: exp2(m) * m.factor, saved={"kind": "e8m0"}),
    form("scale times global scale as float32", store=partial(folded, torch.float32), scale=plain),
    form("scale times global scale as float32, e8m0", store=partial(folded, torch.float32), scale=plain,
         saved={"kind": "e8m0"}),
    form("scale times global scale as float32, group 32", store=partial(folded, torch.float32), scale=plain,
         saved={"group": 32}),
    form("scale times a factor per row as float32", store=partial(folded, torch.float32), scale=plain,
         saved={"factor": "per row"}),
    form("one over scale times global scale as float32", store=reciprocal, scale=lambda m: m.scales.reciprocal(),
         expect=NO_BYTE),
    form("values divided by one over scale times global scale", store=reciprocal, decode=lambda m: (
         m.values(m).unflatten(-1, (-1, m.group)) / m.scales.unsqueeze(-1)).flatten(-2), expect=NO_BYTE),
    *(form(f"scale times a global power of two as {name}", store=partial(folded, dtype), scale=plain,
           saved={"factor": "power of two"}) for dtype, name in NAMES.items()),
    *(form(f"scale times global scale as {NAMES[dtype]}: no byte gives it back", store=partial(folded, dtype),
           scale=plain, expect=NO_BYTE) for dtype in (torch.bfloat16, torch.float16)),
]  # fmt: skip
