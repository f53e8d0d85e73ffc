"""Blockwise decode of packed weights in plain torch, for every device: no tables, so CUDA graphs can capture it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import round_once
from marlin_w4a16.kernels.layout import TILE, PackedFP4, block_tiles, tile_pairs, untile_rows, untile_scales
from marlin_w4a16.kernels.scale_bytes import ScaleKind, scale_values


def decode_tiles(words: Tensor, scales: Tensor, kind: ScaleKind, group: int) -> Tensor:
    """Tiles ``[R, C, ...]`` of a packed weight as float32 ``code * scale`` of shape ``[64 R, 64 C]``, exact."""
    # as E2M1 * 2**-14 in float16: a CPU that flushes subnormals does so to E2M1 * 2**-126 in float32, too
    pairs = [(pair & -0x7FFF8000) | ((pair & 0x01C001C0) << 3) for pair in tile_pairs(words)]
    codes = untile_rows(torch.stack(pairs, -1).view(torch.float16)).float() * 2.0**14
    factors = scale_values(untile_scales(scales.contiguous(), group), kind).abs()  # signs are in the codes
    return (codes.reshape(*factors.shape, group) * factors.unsqueeze(-1)).flatten(1)


def decode_rows(packed: PackedFP4) -> Iterator[tuple[slice, Tensor]]:
    """Walks a packed 2-D weight in blocks of rows: (rows, float32 ``code * scale`` without the multiplier)."""
    step = block_tiles(packed.k)
    for start in range(0, packed.words.shape[0], step):
        rows = slice(start * TILE, min((start + step) * TILE, packed.n))
        tiles = slice(start, start + step)
        block = decode_tiles(packed.words[tiles], packed.scales[tiles], packed.kind, packed.group)
        yield rows, block[: rows.stop - rows.start, : packed.k]


def decode_columns(packed: PackedFP4) -> Iterator[tuple[slice, Tensor]]:
    """Walks a packed 2-D weight in blocks of columns: (columns, float32 ``code * scale`` without the multiplier)."""
    step = block_tiles(packed.n)
    for start in range(0, packed.words.shape[1], step):
        columns = slice(start * TILE, min((start + step) * TILE, packed.k))
        tiles = slice(start, start + step)
        block = decode_tiles(packed.words[:, tiles], packed.scales[:, tiles], packed.kind, packed.group)
        yield columns, block[: packed.n, : columns.stop - columns.start]


def dequantize(packed: PackedFP4, dtype: torch.dtype) -> Tensor:
    """The dense ``[n, k]`` weight, the exact value rounded once to ``dtype``."""
    out = torch.empty((packed.n, packed.k), dtype=dtype, device=packed.words.device)
    for rows, block in decode_rows(packed):
        out[rows] = round_once(block.double() * packed.multiplier[rows, None].double(), dtype)
    return out


def linear_by_blocks(x: Tensor, packed: PackedFP4, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` for ``x`` ``[m, k]``, in float32, one block of decoded rows at a time."""
    x32 = x.float()
    powers, packed = packed.without_powers()
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype, device=x.device)
    for rows, block in decode_rows(packed):
        part = (x32 @ block.mul_(powers[rows, None]).T) * packed.multiplier[rows]
        out[:, rows] = part if bias is None else part + bias[rows].float()
    return out


def linear_grad_input(grad: Tensor, packed: PackedFP4) -> Tensor:
    """``grad @ weight`` for ``grad`` ``[m, n]``, in float32, one block of decoded columns at a time."""
    powers, packed = packed.without_powers()
    scaled = grad.float() * packed.multiplier
    out = torch.empty((grad.shape[0], packed.k), dtype=grad.dtype, device=grad.device)
    for columns, block in decode_columns(packed):
        out[:, columns] = scaled @ block.mul_(powers[:, None])
    return out
