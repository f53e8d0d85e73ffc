"""How codes and scales lie: transposed, in sub-blocks, swizzled."""

from functools import partial

import torch
from torch import Tensor

from marlin_w4a16 import FP4Weight
from programs.written import TABLE, by_groups, by_table, elements, float8, scale_times_factor, written

BLOCKS = 4


def transposed(weight: FP4Weight) -> dict:
    """Codes ``[k / 2, n]``, scales ``[k / group, n]``."""
    return {"codes": weight.codes.t().contiguous(), "scales": weight.scales.t().contiguous()}


def packed_along_n(weight: FP4Weight) -> dict:
    """Codes ``[k, n / 2]``, scales ``[k / group, n]``: two outputs a byte."""
    codes = elements(weight).t()
    return {"codes": codes[:, 0::2] | codes[:, 1::2] << 4, "scales": weight.scales.t().contiguous()}


def decode_transposed(m) -> Tensor:
    values = TABLE[torch.stack((m.codes & 15, m.codes >> 4), 1).flatten(0, 1).int()]
    return (values * m.scale(m).repeat_interleave(m.group, 0)).to(m.dtype)


def multiply_transposed(m, weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight


def swizzle(scales: Tensor) -> Tensor:
    """Scales ``[n, groups]`` in tiles of 128 x 4, as cuBLAS and torchao store them, padded with zeros."""
    n, groups = scales.shape
    padded = scales.new_zeros(-(-n // 128) * 128, -(-groups // 4) * 4)
    padded[:n, :groups] = scales
    return padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4).flatten()


def unswizzled(m) -> Tensor:
    n, groups = m.codes.shape[0], m.codes.shape[1] * 2 // m.group
    tiles = m.scales.view(-(-n // 128), -(-groups // 4), 32, 4, 4)
    rows = tiles.permute(0, 3, 2, 1, 4).reshape(-(-n // 128) * 128, -1)
    return rows[:n, :groups].view(torch.float8_e4m3fn).float() * m.factor


def decoded(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    values = TABLE[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    return by_groups(values, scales.view(torch.float8_e4m3fn).float() * factor)


def row_blocks_of_one(m) -> Tensor:
    parts = zip(m.codes.chunk(BLOCKS), m.scales.chunk(BLOCKS), strict=True)
    return torch.cat([decoded(codes, scales, m.factor) for codes, scales in parts])


def column_blocks_of_one(m) -> Tensor:
    parts = zip(m.codes.chunk(BLOCKS, 1), m.scales.chunk(BLOCKS, 1), strict=True)
    return torch.cat([decoded(codes, scales, m.factor) for codes, scales in parts], 1)


def blocks_of_several(dim: int, m) -> Tensor:
    tensors = (m.get_buffer(f"codes_{i}") for i in range(BLOCKS)), (m.get_buffer(f"scales_{i}") for i in range(BLOCKS))
    return torch.cat([decoded(codes, scales, m.factor) for codes, scales in zip(*tensors, strict=True)], dim)


def several_blocks(dim: int, weight: FP4Weight) -> dict:
    codes, scales = weight.codes.chunk(BLOCKS, dim), weight.scales.chunk(BLOCKS, dim)
    named = {f"codes_{i}": c.contiguous() for i, c in enumerate(codes)}
    return named | {f"scales_{i}": s.contiguous() for i, s in enumerate(scales)} | {"codes": None, "scales": None}


def row_factors_of_several(m) -> Tensor:
    """Blocks of rows with a global scale each."""
    parts = [decoded(m.get_buffer(f"codes_{i}"), m.get_buffer(f"scales_{i}"), m.factor[i]) for i in range(BLOCKS)]
    return torch.cat(parts)


def with_row_factors(weight: FP4Weight) -> dict:
    factor = torch.rand(BLOCKS) + 0.5
    weight.multiplier.copy_(factor.repeat_interleave(weight.n // BLOCKS))
    return several_blocks(0, weight) | {"factor": factor}


def stacked_tiles(m) -> Tensor:
    """Tiles of 16 x 32 that a block-wise quantiser wrote one after the other, in NVFP4 group 16."""
    n, k = 16, 32
    tiles = decoded(m.codes, m.scales, m.factor)  # [tiles, n, k]
    return tiles.view(-1, m.columns // k, n, k).transpose(1, 2).reshape(-1, m.columns)


def in_tiles(weight: FP4Weight) -> dict:
    def cut(t: Tensor) -> Tensor:
        return t.unflatten(0, (-1, 16)).unflatten(-1, (weight.k // 32, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    return {"codes": cut(weight.codes), "scales": cut(weight.scales), "columns": weight.k}


def rolled(weight: FP4Weight) -> dict:
    return {"scales": weight.scales.roll(-1, 1)}


def swapped(t: Tensor) -> Tensor:
    return torch.cat((t[1:2], t[0:1], t[2:]))


form = partial(written, section="layout")
# What neither lies in rows or columns nor is ever put in order before it is multiplied.
UNREAD = {"outcome": "refused", "reason": "it is not NVFP4"}

FORMS = [
    form("[k, n]: codes and scales along the first axis", store=transposed, decode=decode_transposed,
         arrange=Tensor.t, multiply=multiply_transposed),
    form("[k, n], MXFP4", store=transposed, decode=decode_transposed, scale=float8, arrange=Tensor.t,
         multiply=multiply_transposed, saved={"kind": "e8m0", "factor": "none"}),
    form("[k, n], two outputs a byte", store=packed_along_n,
         decode=lambda m: (by_table(m) * m.scale(m).repeat_interleave(m.group, 0)).to(m.dtype), arrange=Tensor.t,
         multiply=multiply_transposed),
    form("[k, n] in F.linear(x, w.T)", store=transposed, decode=lambda m: decode_transposed(m).T),
    form("sub-blocks of rows with cat, of one tensor", decode=row_blocks_of_one),
    form("sub-blocks of columns with cat, of one tensor", decode=column_blocks_of_one),
    form("sub-blocks of rows with cat, of several tensors", decode=partial(blocks_of_several, 0),
         store=partial(several_blocks, 0)),
    form("sub-blocks of columns with cat, of several tensors", decode=partial(blocks_of_several, 1),
         store=partial(several_blocks, 1)),
    form("sub-blocks of rows with a global scale each", decode=row_factors_of_several, store=with_row_factors),
    form("tiles of 16 x 32, one after the other", decode=stacked_tiles, store=in_tiles, expect=UNREAD),
    form("scales swizzled 128 x 4", scale=unswizzled, store=lambda w: {"scales": swizzle(w.scales)},
         saved={"n": 128}),
    form("scales swizzled 128 x 4, padded", scale=unswizzled, store=lambda w: {"scales": swizzle(w.scales)}),
    form("scales stored one group on, rolled back", store=rolled, scale=lambda m: scale_times_factor(m).roll(1, 1)),
    form("scales of two rows stored for each other",
         store=lambda weight: {"scales": swapped(weight.scales)}, scale=lambda m: swapped(scale_times_factor(m))),
    form("two rows swapped after decoding", decode=lambda m: swapped(by_groups(m.values(m), m.scale(m))),
         arrange=swapped),
    form("groups in the first axis", decode=lambda m: (
             TABLE[m.unpack(m).int()] * (float8(m) * m.factor).unsqueeze(-1)).permute(1, 0, 2).flatten(1),
         store=lambda w: {"codes": w.codes.unflatten(1, (-1, w.group // 2)).transpose(0, 1).contiguous(),
                          "scales": w.scales.t().contiguous()}, expect=UNREAD),
]  # fmt: skip
