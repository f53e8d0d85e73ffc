"""``marlin_w4a16::grouped_linear``: rows sorted by expert times the packed weight of each, and its gradient."""

from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.fake_impls.library import (
    DTYPES,
    autocast,
    checked_packed,
    expect,
    expect_no_tangent,
    packed_of,
    register,
    save,
    saved,
    split_weight,
    weight_args,
    weight_schema,
)
from marlin_w4a16.fake_impls.linear import output_shape
from marlin_w4a16.kernels.blocks.experts import grouped_linear_by_blocks, grouped_linear_grad_input
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.target import supports


def grouped_linear(x: Tensor, packed: PackedFP4, offsets: Tensor) -> Tensor:
    """Each group of rows times the transposed weight of its expert, as ``torch.nn.functional.grouped_mm`` does it.

    Args:
        x: ``[rows, k]``, float16, bfloat16 or float32, any strides, on the weight's device.
        packed: ``[experts, n, k]``.
        offsets: int32 or int64 ``[experts]``, the end of each expert's rows, never falling.

    Returns:
        ``[rows, n]`` in the dtype of x, zeros in rows past the last offset. Differentiable in x.
    """
    result: Tensor = torch.ops.marlin_w4a16.grouped_linear(x, *weight_args(packed), offsets)
    return result


def _checked(op: str, x: Tensor, columns: str, args: tuple[Any, ...]) -> tuple[PackedFP4, Tensor]:
    weight, (offsets,) = split_weight(args)
    expect_no_tangent(op, x)
    expect(x.dtype in DTYPES, op, "input", x.dtype, f"one of {DTYPES}")
    words = packed_of(weight).words
    expect(words.ndim == 4, op, "words", f"shape {tuple(words.shape)}", "[experts, ...]")
    lead = tuple(words.shape[:1])
    packed = checked_packed(op, x.device, weight, lead=lead)
    width = packed.n if columns == "n" else packed.k
    expect(x.ndim == 2 and x.shape[1] == width, op, "input", f"shape {tuple(x.shape)}", f"[rows, {columns} = {width}]")
    expect(tuple(offsets.shape) == lead, op, "offsets", f"shape {tuple(offsets.shape)}", lead)
    expect(offsets.dtype in (torch.int32, torch.int64), op, "offsets", offsets.dtype, "torch.int32 or torch.int64")
    expect(offsets.device == x.device, op, "offsets", f"device {offsets.device}", f"that of the input, {x.device}")
    return packed, offsets


def _fake(x: Tensor, *args: Any) -> Tensor:
    packed, _ = _checked("grouped_linear", x, "k", args)
    return x.new_empty(output_shape(x.shape, packed.n))


def _blocks(x: Tensor, *args: Any) -> Tensor:
    return grouped_linear_by_blocks(x, *_checked("grouped_linear", x, "k", args))


def _cuda(x: Tensor, *args: Any) -> Tensor:
    if not supports(x.device) or x.dtype == torch.float32:
        return _blocks(x, *args)
    from marlin_w4a16.kernels.grouped_linear import grouped_linear as fused  # Triton is on Linux only

    return fused(x, *_checked("grouped_linear", x, "k", args))


def _fake_grad_input(grad: Tensor, *args: Any) -> Tensor:
    packed, _ = _checked("grouped_linear_grad_input", grad, "n", args)
    return grad.new_empty(output_shape(grad.shape, packed.k))


def _grad_input(grad: Tensor, *args: Any) -> Tensor:
    return grouped_linear_grad_input(grad, *_checked("grouped_linear_grad_input", grad, "n", args))


def _cuda_grad_input(grad: Tensor, *args: Any) -> Tensor:
    if not supports(grad.device) or grad.dtype == torch.float32:
        return _grad_input(grad, *args)
    from marlin_w4a16.kernels.grad_input import linear_grad_input as fused  # Triton is on Linux only

    return grouped_linear_grad_input(grad, *_checked("grouped_linear_grad_input", grad, "n", args), fused)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    save(ctx, inputs[1:], output)  # x is not kept


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = saved(ctx)
    found = torch.ops.marlin_w4a16.grouped_linear_grad_input(grad, *args) if ctx.needs_input_grad[0] else None
    return (found, *[None for _ in args])


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = saved(ctx)
    return (torch.ops.marlin_w4a16.grouped_linear(grad, *args), *[None for _ in args])


_LINEAR = f"grouped_linear(Tensor x, {weight_schema()}, Tensor offsets) -> Tensor"
_GRAD_INPUT = f"grouped_linear_grad_input(Tensor grad, {weight_schema()}, Tensor offsets) -> Tensor"
register(_LINEAR, _blocks, _cuda, _fake, _backward, _setup)
register(_GRAD_INPUT, _grad_input, _cuda_grad_input, _fake_grad_input, _backward_grad_input, _setup)
autocast("grouped_linear")
