"""What only looks like FP4, or cannot be served: it runs as traced, with a reason."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import FP4Weight, quantize_mxfp4
from programs.written import TABLE, K, N, Written, by_groups, by_table, decode_by_groups, float8, written

NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0]
)  # fmt: skip
SQUARE = {"n": K}


def another_table(m: Written) -> Tensor:
    return m.table[m.unpack(m).int()]


def with_wrong_entry(weight: FP4Weight) -> dict:
    table = TABLE.clone()
    table[5] = 3.5
    return {"table": table}


def integers(m: Written) -> Tensor:
    return m.unpack(m).float() - 8


def one_element_changed(m: Written) -> Tensor:
    weight = decode_by_groups(m)
    weight[N - 1, K - 1] += 1
    return weight


def group_of(size: int) -> dict:
    """Scales of groups that no format has."""

    def store(weight: FP4Weight) -> dict:
        return {"scales": (torch.rand(weight.n, weight.k // size) + 0.5).to(torch.float8_e4m3fn).view(torch.uint8)}

    return {"store": store, "saved": {"k": 256}, "x": (3, 256)}


def straddling(weight: FP4Weight) -> dict:
    """40 columns: groups of 16 run on over the ends of rows."""
    codes = torch.randint(256, (N, 20)).to(torch.uint8)
    return {"codes": codes, "scales": (torch.rand(N * 40 // 16) + 0.5).to(torch.float8_e4m3fn).view(torch.uint8)}


def nan_scale(weight: FP4Weight) -> dict:
    scales = weight.scales.clone()
    scales[N - 1, 2] = 0x7F
    return {"scales": scales}


def nan_exponent(weight: FP4Weight) -> dict:
    scales = quantize_mxfp4(torch.randn(N, K)).scales
    scales[0, 1] = 0xFF
    return {"scales": scales}


def e5m2(weight: FP4Weight) -> dict:
    """Scales out of the range of E4M3: from 2**-14 up to 2**15."""
    powers = torch.exp2(torch.randint(-14, 16, weight.scales.shape).float())
    return {"scales": (powers * (1 + torch.randint(4, powers.shape) / 4)).to(torch.float8_e5m2)}


def trained(weight: FP4Weight) -> dict:
    return {"factor": nn.Parameter(weight.multiplier[:1].clone())}


def written_to(m: Written, x: Tensor) -> Tensor:
    m.factor.mul_(1.0)
    return linear(x, m.weight())


def dense(weight: FP4Weight) -> dict:
    return {"dense": torch.randn(weight.n, weight.k), "codes": None}


def wrong_axis(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    """A square weight multiplied as ``[k, n]``: its groups run along the outputs."""
    return x @ weight


def into_out(m: Written, weight: Tensor, x: Tensor) -> Tensor:
    return torch.matmul(x, weight.T, out=x.new_empty(x.shape[0], weight.shape[0]))


form = partial(written, section="refused")
refused = partial(form, expect={"outcome": "refused"})
no_candidate = partial(form, expect={"outcome": "no candidate"})


def because(reason: str) -> dict:
    return {"expect": {"outcome": "refused", "reason": reason}}


FORMS = [
    refused("NF4", values=another_table, store=lambda w: {"table": NF4}),
    refused("NF4 with float32 scales in groups of 64", values=another_table, scale=lambda m: m.scales,
            store=lambda w: {"table": NF4, "scales": torch.rand(N, K // 64)}),
    refused("INT4, symmetric", values=integers),
    refused("INT4 with zero points",
         values=lambda m: (m.unpack(m).view(N, -1, m.group).float() - m.zeros.unsqueeze(-1)).flatten(-2),
            store=lambda w: {"zeros": torch.randint(16, w.scales.shape).to(torch.uint8)}),
    refused("one wrong entry in the table", values=another_table, store=with_wrong_entry),
    refused("one element changed", decode=one_element_changed),
    refused("a constant added", decode=lambda m: decode_by_groups(m) + 0.01),
    refused("abs", decode=lambda m: decode_by_groups(m).abs()),
    refused("clamped", decode=lambda m: decode_by_groups(m).clamp(-1, 1)),
    refused("columns rolled by one after decoding", decode=lambda m: decode_by_groups(m).roll(1, 1)),
    refused("a square weight multiplied along its outputs", saved=SQUARE, multiply=wrong_axis),
    refused("E5M2 scales", store=e5m2, scale=lambda m: m.scales.float() * m.factor),
    *(refused(f"groups of {size}", **group_of(size)) for size in (8, 64, 128)),
    refused("groups of 16 that run over the ends of rows", store=straddling,
         decode=lambda m: (by_table(m).view(-1, 16) * (float8(m) * m.factor)[:, None]).view(N, 40), x=(3, 40)),
    form("a NaN among e4m3 scales", store=nan_scale, **because("NaN")),
    form("a NaN among e8m0 scales", store=nan_exponent, scale=float8,
         saved={"kind": "e8m0", "factor": "none"}, **because("NaN")),
    form("a trained factor", store=trained, **because("requires grad")),
    form("a product with out=", multiply=into_out, **because("out=")),
    form("float64", dtype=torch.float64, **because("float64")),
    form("addmm to a matrix, float16", dtype=torch.float16, also=((3, N),),
         multiply=lambda m, w, x, y: torch.addmm(y, x, w.T), **because("in range")),
    no_candidate("a weight that depends on the input", call=lambda m, x: linear(x, m.weight() * x.mean())),
    no_candidate("codes that depend on the input", call=lambda m, x: linear(x, by_groups(
        TABLE[(m.unpack(m) ^ (x.sum() > 1e9)).int()], m.scale(m)))),
    no_candidate("a tensor that the graph writes to", call=written_to),
    no_candidate("a dense weight", store=dense, decode=lambda m: m.dense),
]  # fmt: skip
