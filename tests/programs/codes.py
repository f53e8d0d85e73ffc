"""Where four-bit codes lie in their bytes, and how their values are computed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, one_hot

from marlin_w4a16 import E2M1_VALUES, FP4Weight
from programs.written import TABLE, by_table, elements, written

PAIRS = torch.stack((TABLE.repeat(16), TABLE.repeat_interleave(16)), -1)
VALUES = list(E2M1_VALUES)


def bits_of_bfloat16(m) -> Tensor:
    codes = m.unpack(m).to(torch.int16)
    return (((codes & 8) << 12 | (codes & 7) << 6).view(torch.bfloat16) * 2.0**126).float()


def bits_of_float16(m) -> Tensor:
    codes = m.unpack(m).to(torch.int16)
    return (((codes & 8) << 12 | (codes & 7) << 9).view(torch.float16) * 2.0**14).float()


def nested_where(m) -> Tensor:
    codes = m.unpack(m)
    exponent, mantissa = (codes >> 1) & 3, (codes & 1).float()
    normal = torch.where(exponent == 1, 1 + mantissa / 2, torch.where(exponent == 2, 2 + mantissa, 4 + 2 * mantissa))
    magnitude = torch.where(exponent == 0, mantissa / 2, normal)
    return torch.where(codes >= 8, -magnitude, magnitude)


def gather_ldexp(m) -> Tensor:
    """The whole weight of MXFP4, ``[k, n]``."""
    values = torch.gather(TABLE.expand(m.codes.shape[0], 16), 1, m.unpack(m).long())
    return torch.ldexp(values, m.scales.int().sub(127).repeat_interleave(m.group, -1)).T


def take_repeat_interleave(m) -> Tensor:
    """The whole weight."""
    return torch.take(TABLE, m.unpack(m).long()) * m.scale(m).repeat_interleave(m.group, -1)


def pairs_of_floats(m) -> Tensor:
    pairs = m.codes.float()
    return torch.stack((pairs % 16, pairs // 16), -1).flatten(-2)


def float_arithmetic(m) -> Tensor:
    codes = m.unpack(m).float()
    sign, magnitude = 1 - 2 * (codes // 8), codes % 8
    exponent, mantissa = magnitude // 2, magnitude % 2
    subnormal = exponent.eq(0).float()
    return sign * (1 - subnormal + mantissa / 2) * torch.exp2(exponent - 1 + subnormal)


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where codes lie in their bytes: an inverse pair, from codes ``[n, k]``, one a byte, and back."""

    pack: Callable[[Tensor, int], Tensor]
    unpack: Callable[[Tensor, int], Tensor]

    def parts(self) -> dict[str, Any]:
        """What a `Written` of this arrangement is made with."""
        return {
            "store": lambda weight: {"codes": self.pack(elements(weight), weight.group)},
            "unpack": lambda m: self.unpack(m.codes, m.group),
        }


def pack_planes(codes: Tensor) -> Tensor:
    low, high = codes.chunk(2, -1)
    return (low | high << 4).contiguous()


def planes(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), -1)


ARRANGEMENTS = {
    "low nibble first": Arrangement(
        lambda codes, group: codes[:, 0::2] | codes[:, 1::2] << 4,
        lambda packed, group: torch.stack((packed & 15, packed >> 4), -1).flatten(-2),
    ),
    "high nibble first": Arrangement(
        lambda codes, group: codes[:, 0::2] << 4 | codes[:, 1::2],
        lambda packed, group: torch.stack((packed >> 4, packed & 15), -1).flatten(-2),
    ),
    "planes of nibbles in a row": Arrangement(
        lambda codes, group: pack_planes(codes), lambda packed, group: planes(packed)
    ),
    "planes of nibbles in a group": Arrangement(
        lambda codes, group: pack_planes(codes.unflatten(-1, (-1, group))).flatten(-2),
        lambda packed, group: planes(packed.unflatten(-1, (-1, group // 2))).flatten(-2),
    ),
    "planes of nibbles in the whole tensor": Arrangement(
        lambda codes, group: pack_planes(codes.flatten()).view(codes.shape[0], -1),
        lambda packed, group: planes(packed.flatten()).view(packed.shape[0], -1),
    ),
}


def literal_table(m) -> Tensor:
    return torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])[m.unpack(m).long()]


def list_of_choices(m) -> Tensor:
    codes = m.unpack(m)
    values = torch.zeros(codes.shape)
    for code, value in enumerate(VALUES):
        values = torch.where(codes == code, value, values)
    return values


def table_of_magnitudes(m) -> Tensor:
    codes = m.unpack(m).int()
    return m.table[codes & 7] * (1 - 2 * (codes >> 3))


def bytes_viewed(m) -> Tensor:
    codes = m.codes.view(torch.uint8)
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def arithmetic_shift(m) -> Tensor:
    """int8 bytes without a view: ``>>`` brings the sign along, the mask takes it away."""
    return torch.stack((m.codes & 15, (m.codes >> 4) & 15), -1).flatten(-2)


def blocks_by_table(m) -> Tensor:
    """gpt-oss: blocks ``[n, k / group, group / 2]``."""
    return (m.values(m) * m.scale(m).unsqueeze(-1)).flatten(-2)


def flat(m) -> Tensor:
    return (m.values(m).view(-1, m.group) * m.scale(m)[:, None]).view(m.shape)


def with_table(weight: FP4Weight) -> dict:
    return {"table": TABLE.clone()}


form = partial(written, section="codes")
FORMS = [
    form("table + stack", values=by_table),
    *(form(name, **arrangement.parts()) for name, arrangement in ARRANGEMENTS.items()),
    form("planes of nibbles in a group of 32", **ARRANGEMENTS["planes of nibbles in a group"].parts(),
         saved={"group": 32}),
    form("high nibble first, // and % of bytes", store=ARRANGEMENTS["high nibble first"].parts()["store"],
         unpack=lambda m: torch.stack((m.codes // 16, m.codes % 16), -1).flatten(-2)),
    form("stored as float4_e2m1fn_x2", store=lambda w: {"codes": w.codes.view(torch.float4_e2m1fn_x2)},
         unpack=bytes_viewed),
    form("shifts viewed as bfloat16, times a power of two", values=bits_of_bfloat16),
    form("shifts viewed as float16, times a power of two", values=bits_of_float16),
    form("nested where", values=nested_where),
    form("gather + ldexp + .T", decode=gather_ldexp, arrange=Tensor.t, multiply=lambda m, w, x: x @ w,
         saved={"kind": "e8m0", "factor": "none"}),
    form("take + repeat_interleave", decode=take_repeat_interleave),
    form("% and // in floats", unpack=pairs_of_floats, values=float_arithmetic),
    form("table in a buffer", values=lambda m: m.table[m.unpack(m).long()], store=with_table),
    form("table as an embedding",
         values=lambda m: embedding(m.unpack(m).int(), m.table[:, None]).squeeze(-1), store=with_table),
    form("table as a literal", values=literal_table),
    form("table as a Python list", values=lambda m: torch.tensor(VALUES, device=m.codes.device)[m.unpack(m).long()]),
    form("table as a Python list of choices", values=list_of_choices),
    form("table of magnitudes and a sign", values=table_of_magnitudes, store=lambda w: {"table": TABLE[:8].clone()}),
    form("table of 256 pairs", values=lambda m: PAIRS[m.codes.int()].flatten(-2)),
    form("table of 256 pairs, index_select",
         values=lambda m: torch.index_select(PAIRS, 0, m.codes.flatten().int()).view(m.codes.shape[0], -1)),
    form("table in bfloat16", values=lambda m: m.table[m.unpack(m).int()].float(),
         store=lambda w: {"table": TABLE.bfloat16()}),
    form("one_hot @ table", values=lambda m: one_hot(m.unpack(m).long(), 16).float() @ m.table, store=with_table),
    form("int8 bytes, viewed as uint8", unpack=bytes_viewed, store=lambda w: {"codes": w.codes.view(torch.int8)}),
    form("int8 bytes, masked", unpack=arithmetic_shift, store=lambda w: {"codes": w.codes.view(torch.int8)}),
    form("blocks of a group in an axis of their own", decode=blocks_by_table,
         store=lambda w: {"codes": w.codes.unflatten(-1, (-1, w.group // 2))}),
    form("flat codes and scales", decode=flat, store=lambda w: {
        "codes": w.codes.flatten(), "scales": w.scales.flatten(), "shape": (w.n, w.k)}),
]  # fmt: skip
