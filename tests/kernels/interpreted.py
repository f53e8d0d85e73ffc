"""What tests run in Triton's interpreter (interpreter.py)."""

from types import FunctionType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from marlin_w4a16.kernels import grouped_linear, moe
from marlin_w4a16.kernels.decode import route, tiles
from marlin_w4a16.kernels.decode.tiles import Tiles
from marlin_w4a16.kernels.decode.unpack import scale_pairs, unpack_words
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.portable import linear as kernels

_patch = interpreter._patch_lang


def _patch_once(function: FunctionType) -> Any:
    """The functions that a kernel calls find triton.language patched: to look through it for each took a quarter of the
    time."""
    languages = [tl.core, tl] if tl.core in function.__globals__.values() else [tl]
    return _patch(function) if any(tl.core.is_builtin(language.load) for language in languages) else None


interpreter._patch_lang = _patch_once  # read in Triton 3.7


@triton.jit
def _unpack_kernel(words, scales, out, kind: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    pairs = scale_pairs(tl.load(scales + at), kind, out.dtype.element_ty, False)
    words_of_groups = tl.load(words + at[:, None] * 2 + tl.arange(0, 2)[None, :])
    values = unpack_words(words_of_groups, pairs, kind, out.dtype.element_ty, False)
    tl.store(out + tl.arange(0, SIZE * 16), values.reshape((SIZE * 16,)))


def unpack(words: Tensor, scales: Tensor, kind: str) -> Tensor:
    """Words ``[size, 2 groups]`` with scale words ``[size]``, as ``[size, 2 groups, 2 p, 2 r, 2 h]``."""
    out = torch.empty((*words.shape, 2, 2, 2), dtype=torch.float16)
    _unpack_kernel[(1,)](words, scales, out, kind=kind, SIZE=words.shape[0])
    return out


def fused(x: Tensor, packed: PackedFP4, bias: Tensor | None, launch: Launch) -> Tensor:
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype)
    kernels.fused(x, packed, bias, out, launch, ptx=False, wgmma=False)
    return out


def decode(packed: PackedFP4) -> Tensor:
    rows, columns = packed.words.shape[:2]
    out, scales = torch.empty((64 * rows, 64 * columns), dtype=torch.float16), packed.scales.view(torch.int32)
    kernels._decode_kernel[(rows, columns)](
        packed.words, scales, out, columns, kind=packed.kind, GROUP=packed.group, PTX=False
    )
    return out


def epilogue(parts: Tensor, packed: PackedFP4, bias: Tensor | None, rows: slice) -> Tensor:
    out = torch.empty((parts.shape[1], packed.n), dtype=torch.float16)
    kernels._epilogue(parts, packed, bias, out[:, rows], rows)
    return out


def mixture(
    x: Tensor,
    experts: Experts,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    launch: Launch | None,
) -> Tensor:
    out = torch.empty((x.shape[0], experts.w2.n), dtype=x.dtype)
    moe.fused(x, experts, topk_weights, topk_ids, expert_map, out, launch, ptx=False, wgmma=False)
    return out


def grouped(x: Tensor, packed: PackedFP4, offsets: Tensor, launch: Launch) -> Tensor:
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype)
    grouped_linear.grouped(x, packed, offsets, out, launch, ptx=False, wgmma=False)
    return out


def tiles_of_experts(topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int) -> Tiles:
    return route.tiles_of_experts(topk_ids, expert_map, experts, block_m)


def sorted_tokens(
    x: Tensor, topk_ids: Tensor, expert_map: Tensor | None, experts: int, block_m: int
) -> tuple[Tiles, Tensor]:
    return route.sorted_tokens(x, topk_ids, expert_map, experts, block_m, pdl=False)


def tiles_of_offsets(offsets: Tensor, rows: int, block_m: int) -> Tiles:
    return tiles.tiles_of_offsets(offsets, rows, block_m)
