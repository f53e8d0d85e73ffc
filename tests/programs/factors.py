"""How a global scale enters, in float32."""

from functools import partial

import torch
from torch import Tensor, nn

from marlin_w4a16 import FP4Weight
from programs.written import by_groups, decode_by_groups, float8, written


def per_row(weight: FP4Weight) -> dict:
    return {"factor": weight.multiplier[:, None].clone()}


def divisor(weight: FP4Weight) -> dict:
    factor = 1 / weight.multiplier[:1]
    weight.multiplier.fill_(1 / factor.item())
    return {"factor": factor}


def two_factors(weight: FP4Weight) -> dict:
    first, second = torch.tensor(0.37), torch.tensor(0.0041)
    weight.multiplier.copy_(first * second)
    return {"first": first, "second": second}


def largest(weight: FP4Weight) -> dict:
    """The largest value of the dense weight, from which ModelOpt derives its global scale."""
    amax = weight.multiplier[:1] * (6 * 448)
    weight.multiplier.copy_(amax / (6 * 448))
    return {"amax": amax}


def as_float(weight: FP4Weight) -> dict:
    return {"factor": weight.multiplier[0].item()}


def after_the_scales(m) -> Tensor:
    return by_groups(m.values(m), float8(m)) * m.factor


def in_no_grad(m) -> Tensor:
    with torch.no_grad():
        return decode_by_groups(m)


form = partial(written, section="global scale")
FORMS = [
    form("buffer [1]"),
    form("buffer []", store=lambda w: {"factor": w.multiplier[0].clone()}),
    form("buffer [n, 1], one per row", store=per_row, saved={"factor": "per row"}),
    form("buffer [n, 1], over codes times scales", store=per_row, decode=after_the_scales, saved={"factor": "per row"}),
    form("divisor", store=divisor, scale=lambda m: float8(m) / m.factor),
    form("divisor of codes times scales", store=divisor, decode=lambda m: by_groups(m.values(m), float8(m)) / m.factor),
    form("divisor, its reciprocal computed in forward", store=divisor, scale=lambda m: float8(m) * (1 / m.factor)),
    form("Python float", store=as_float),
    form("Python float, over codes times scales", store=as_float, decode=after_the_scales),
    form("two factors, multiplied", store=two_factors, scale=lambda m: float8(m) * (m.first * m.second)),
    form("two factors, one after the other", store=two_factors, scale=lambda m: float8(m) * m.first * m.second),
    form("over codes times scales", decode=after_the_scales),
    form("over the codes", decode=lambda m: by_groups(m.values(m) * m.factor, float8(m))),
    form("amax over 6 * 448", store=largest, scale=lambda m: float8(m) * (m.amax / (6 * 448))),
    form("bfloat16 buffer", store=lambda w: {"factor": w.multiplier[:1].bfloat16()},
         scale=lambda m: float8(m) * m.factor.float(), saved={"factor": "power of two"}),
    form("parameter, without grad", decode=in_no_grad,
         store=lambda w: {"factor": nn.Parameter(w.multiplier[:1].clone())}),
    form("none, and one over the output", scale=float8, saved={"factor": "none"}, store=lambda w: {"output": 0.37},
         multiply=lambda m, w, x: nn.functional.linear(x, w) * m.output),
]  # fmt: skip
