"""Weights that are written rather than returned."""

from functools import partial

import torch
from torch import Tensor

from programs.written import TABLE, by_groups, float8, written


def empty(m) -> Tensor:
    return torch.empty(m.codes.shape[0], m.codes.shape[1] * 2)


def setitem(m) -> Tensor:
    values = empty(m)
    values[:, 0::2] = TABLE[(m.codes & 15).long()]
    values[:, 1::2] = TABLE[(m.codes >> 4).long()]
    return values


def codes_set_first(m) -> Tensor:
    codes = torch.empty(m.codes.shape[0], m.codes.shape[1] * 2, dtype=torch.uint8)
    codes[..., 0::2] = m.codes & 15
    codes[..., 1::2] = m.codes >> 4
    return TABLE[codes.int()]


def through_views(m) -> Tensor:
    values = empty(m)
    low, high = values.view(-1, 2).unbind(-1)
    low.copy_(TABLE[(m.codes & 15).int()].flatten())
    high.copy_(TABLE[(m.codes >> 4).int()].flatten())
    return values


def masked(m) -> Tensor:
    codes = m.unpack(m)
    sign = torch.ones(codes.shape)
    sign[codes >= 8] = -1
    return TABLE[:8][codes.int() & 7] * sign


def scaled_in_place(m) -> Tensor:
    weight, scales = m.values(m), m.scale(m)
    weight.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))
    return weight


def groups_in_a_loop(m) -> Tensor:
    weight, scales = m.values(m), m.scale(m)
    for i in range(scales.shape[1]):
        weight[:, i * m.group : (i + 1) * m.group] *= scales[:, i : i + 1]
    return weight


def gpt_oss(m) -> Tensor:
    """As transformers decodes gpt-oss's blocks."""
    blocks, exponents = m.codes.unflatten(-1, (-1, 16)).flatten(0, 1), m.scales.flatten()[:, None].int() - 127
    out = torch.empty(blocks.shape[0], 32)
    for start in range(0, blocks.shape[0], 64):
        rows = slice(start, start + 64)
        sub = out[rows]
        sub[:, 0::2] = TABLE[(blocks[rows] & 15).int()]
        sub[:, 1::2] = TABLE[(blocks[rows] >> 4).int()]
        torch.ldexp(sub, exponents[rows], out=sub)
    return out.view(m.codes.shape[0], -1)


def out_of_index_select(m) -> Tensor:
    values = torch.empty(m.codes.numel() * 2)
    torch.index_select(TABLE, 0, m.unpack(m).flatten().int(), out=values)
    return values.view(m.codes.shape[0], -1)


def out_of_mul(m) -> Tensor:
    weight = torch.empty(*m.scales.shape, m.group)
    torch.mul(m.values(m).view_as(weight), m.scale(m).unsqueeze(-1), out=weight)
    return weight.view(m.codes.shape[0], -1)


def factor_in_place(m) -> Tensor:
    scales = float8(m)
    scales *= m.factor
    return scales


def scattered(m) -> Tensor:
    columns = torch.arange(0, m.codes.shape[1] * 2, 2).expand_as(m.codes)
    values = torch.zeros(m.codes.shape[0], m.codes.shape[1] * 2)
    values.scatter_(1, columns, TABLE[(m.codes & 15).int()])
    return values.scatter_add_(1, columns + 1, TABLE[(m.codes >> 4).int()])


def index_copied(m) -> Tensor:
    values, even = empty(m), torch.arange(0, m.codes.shape[1] * 2, 2)
    values.index_copy_(1, even, TABLE[(m.codes & 15).int()])
    return values.index_copy_(1, even + 1, TABLE[(m.codes >> 4).int()])


def cast_into(m) -> Tensor:
    """Written to a 16-bit tensor, which rounds."""
    weight = torch.empty(m.codes.shape[0], m.codes.shape[1] * 2, dtype=m.dtype)
    weight[:] = by_groups(m.values(m), m.scale(m))
    return weight


form = partial(written, section="in place")
FORMS = [
    form("setitem of values", values=setitem),
    form("setitem of codes", values=codes_set_first),
    form("copy_ through views", values=through_views),
    form("setitem of signs by a mask", values=masked),
    form("mul_ of a view by the scales", decode=scaled_in_place),
    form("*= group by group", decode=groups_in_a_loop),
    form("setitem and ldexp out=, in chunks of rows (gpt-oss)", decode=gpt_oss,
         saved={"kind": "e8m0", "factor": "none"}),
    form("index_select out=", values=out_of_index_select),
    form("mul out=", decode=out_of_mul),
    form("*= of the scales by the global scale", scale=factor_in_place),
    form("scatter_ and scatter_add_", values=scattered),
    form("index_copy_", values=index_copied),
    form("setitem into bfloat16", decode=cast_into, dtype=torch.bfloat16),
]  # fmt: skip
