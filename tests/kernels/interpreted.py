"""What tests run in Triton's interpreter (interpreter.py)."""

from types import FunctionType
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from marlin_w4a16.kernels import grouped_linear, moe, packing
from marlin_w4a16.kernels.decode import route, tiles
from marlin_w4a16.kernels.decode.tiles import Tiles
from marlin_w4a16.kernels.decode.unpack import scale_pairs, unpack_words
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.grad_launch import GradLaunch
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.layout import PackedFP4, empty_packed
from marlin_w4a16.kernels.portable import dense, grad_input
from marlin_w4a16.kernels.portable import linear as kernels

_patch = interpreter._patch_lang


def _patch_once(function: FunctionType) -> Any:
    """The functions that a kernel calls find triton.language patched: to look through it for each took a quarter of the
    time."""
    languages = [tl.core, tl] if tl.core in function.__globals__.values() else [tl]
    return _patch(function) if any(tl.core.is_builtin(language.load) for language in languages) else None


def _splat_once(self: Any, ret_ty: Any, arg: Any) -> Any:
    """Comparisons of scalars stay bool, as masks have to be from Triton 3.9 on: it makes numbers of them."""
    made = _splat(self, ret_ty, arg)
    made.data = made.data.astype(bool) if arg.data.dtype == bool else made.data
    return made


interpreter._patch_lang = _patch_once  # read in Triton 3.7 to 3.9
_splat, interpreter.InterpreterBuilder.create_splat = interpreter.InterpreterBuilder.create_splat, _splat_once


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


def packed_by_the_kernel(weight: FP4Weight, n: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    packed = empty_packed(weight, n)
    packed.words.fill_(-1)
    packed.scales.fill_(0xAA)
    before = [tensor._version for tensor in (packed.words, packed.scales)]
    packing.write_tiles(weight, packed, rows)
    assert [tensor._version - 1 for tensor in (packed.words, packed.scales)] == before, "a write is counted"
    return packed.words, packed.scales


def fused(x: Tensor, packed: PackedFP4, bias: Tensor | None, launch: Launch) -> Tensor:
    out = torch.empty((x.shape[0], packed.n), dtype=x.dtype)
    kernels.fused(x, packed, bias, out, launch, ptx=False, wgmma=False)
    return out


def decode(packed: PackedFP4, columns: slice | None = None) -> Tensor:
    rows, all_columns = packed.words.shape[:2]
    out = torch.empty((64 * rows, 64 * all_columns), dtype=torch.float16)
    dense.write_out(packed.words, packed.scales, out, packed.kind, columns, ptx=False)
    return out


def epilogue(parts: Tensor, packed: PackedFP4, bias: Tensor | None, rows: slice) -> Tensor:
    out = torch.empty((parts.shape[1], packed.n), dtype=torch.float16)
    kernels._epilogue(parts, packed, bias, out[:, rows], rows)
    return out


def scaled_gradient(grad: Tensor, packed: PackedFP4, programs: int) -> tuple[Tensor, Tensor]:
    with patch.object(grad_input, "_SCALE_PROGRAMS", programs):
        return grad_input.scaled_gradient(grad, packed)


def fused_grad_input(grad: Tensor, packed: PackedFP4, launch: GradLaunch) -> Tensor:
    out = torch.empty((grad.shape[0], packed.k), dtype=grad.dtype)
    grad_input.fused(grad, packed, out, launch, ptx=False, wgmma=False)
    return out


def grad_input_through_dense(grad: Tensor, packed: PackedFP4, weight_bytes: int, parts_bytes: int) -> Tensor:
    """With scratch of so many bytes; a CPU has no product of float16 into float32."""
    out = torch.empty((grad.shape[0], packed.k), dtype=grad.dtype)
    product = patch.object(torch, "mm", lambda a, b, out_dtype, out: out.copy_(a.to(out_dtype) @ b.to(out_dtype)))
    scratch = patch.multiple(grad_input, _WEIGHT_BYTES=weight_bytes, _PARTS_BYTES=parts_bytes)
    with product, scratch:
        grad_input.through_dense(grad, packed, out, ptx=False)
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
