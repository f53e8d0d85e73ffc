"""``marlin_w4a16::linear``: ``x @ weight.T + bias`` from a packed FP4 weight, and its gradient."""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from marlin_w4a16.fake_impls import inductor
from marlin_w4a16.fake_impls.eager import Call, fits, is_plain, keep, known, needs_gradient, new_output, proof_of
from marlin_w4a16.fake_impls.library import (
    DTYPES,
    autocast,
    checked_weight,
    expect,
    expect_no_tangent,
    is_adjacent,
    register,
    save,
    saved,
    split_weight,
    weight_args,
    weight_schema,
)
from marlin_w4a16.kernels.blocks.dequantize import linear_by_blocks, linear_grad_input
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.private import apply
from marlin_w4a16.kernels.target import supports


def linear(x: Tensor, packed: PackedFP4, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` from a packed weight.

    Args:
        x: ``[..., k]``, float16, bfloat16 or float32, any strides, on the weight's device.
        packed: the weight; float16 on a GPU wants one that fits it (see `FP4Weight.fit`).
        bias: ``[n]`` or None.

    Returns:
        ``[..., n]`` in the dtype of x, or of autocast where that is on. Differentiable in x and bias.
    """
    out = None if torch.compiler.is_compiling() else again(x, packed, bias)
    if out is not None:
        return out
    if is_plain(x) and (shape := x.shape) and shape[-1] == packed.k and x.numel() and packed.n:
        proof = proof_of(packed)
        if proof and proof.device == x.get_device() and (bias is None or fits(bias, (packed.n,), proof.device)):
            return _differentiable(x, packed, bias, None) if needs_gradient(x, bias) else _launched(x, packed, bias)
    result: Tensor = torch.ops.marlin_w4a16.linear(x, *weight_args(packed), bias)
    return result


def again(x: Tensor, packed: PackedFP4, bias: Tensor | None) -> Tensor | None:
    """`linear`, if such a call was made before and is plain; else None. Not to be compiled."""
    call = known("linear", x, packed, bias)
    if call is None:
        return None
    return _differentiable(x, packed, bias, call) if needs_gradient(x, bias) else call(x)


def _launched(x: Tensor, packed: PackedFP4, bias: Tensor | None) -> Tensor:
    """A call whose arguments were proved to be right."""
    from marlin_w4a16.kernels.linear import bound, linear_into  # Triton is on Linux only

    out = new_output(x, packed.n)
    linear_into(x, *packed.tensors, bias, packed.n, packed.k, packed.group, packed.kind, out)
    keep("linear", x, packed, bias, out, partial(bound, x, packed, bias))
    return out


def _differentiable(x: Tensor, packed: PackedFP4, bias: Tensor | None, call: Call | None) -> Tensor:
    return cast(Tensor, apply(_Linear, x, bias, packed, call))


class _Linear(torch.autograd.Function):
    """The gradient of a plain call, without the dispatcher; that of a gradient goes through the ops.

    It saves what the op saves: checkpointing may run the one forward and recompute by the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: PackedFP4, call: Call | None) -> Tensor:
        ctx.save_for_backward(*packed.tensors)
        ctx.of = packed, None if bias is None else bias.dtype
        return _launched(x, packed, bias) if call is None else call(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, bias_dtype = ctx.of
        _ = ctx.saved_tensors  # raises where one was written to since
        wants_x, wants_bias, *_ = ctx.needs_input_grad
        grad_x = _gradient(grad, packed) if wants_x else None
        return grad_x, _bias_gradient(grad, bias_dtype) if wants_bias else None, None, None


def _gradient(grad: Tensor, packed: PackedFP4) -> Tensor:
    """``grad @ weight``, by the op where something would see it, as a gradient of it does."""
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        call = known("gradient", grad, packed)
        if call is not None:
            return call(grad)
        proof = proof_of(packed) if is_plain(grad) and grad.numel() else None
        if proof is not None and proof.device == grad.get_device():
            return _launched_gradient(grad, packed)
    result: Tensor = torch.ops.marlin_w4a16.linear_grad_input(grad, *weight_args(packed))
    return result


def _launched_gradient(grad: Tensor, packed: PackedFP4) -> Tensor:
    from marlin_w4a16.kernels.grad_input import bound, grad_input_into  # Triton is on Linux only

    out = new_output(grad, packed.k)
    grad_input_into(grad, *packed.tensors, packed.n, packed.k, packed.group, packed.kind, out)
    keep("gradient", grad, packed, None, out, partial(bound, grad, packed))
    return out


def _bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32).to(dtype)


def output_shape(shape: torch.Size, width: int) -> tuple[int, ...]:
    """The shape of the result: the last axis becomes ``width``."""
    return (*shape[:-1], width)


def _checked(x: Tensor, args: tuple[Any, ...]) -> tuple[PackedFP4, Tensor | None]:
    weight, (bias,) = split_weight(args)
    packed = checked_weight("linear", x, "k", weight)
    expect_no_tangent("linear", x, bias)
    if bias is not None:
        expect(tuple(bias.shape) == (packed.n,), "linear", "bias", f"shape {tuple(bias.shape)}", f"({packed.n},)")
        expect(bias.dtype in DTYPES, "linear", "bias", bias.dtype, f"one of {DTYPES}")
        expect(bias.device == x.device, "linear", "bias", f"device {bias.device}", f"that of the input, {x.device}")
    return packed, bias


def _fake(x: Tensor, *args: Any) -> Tensor:
    inductor.register()
    packed, _ = _checked(x, args)
    return x.new_empty(output_shape(x.shape, packed.n))


def _blocks(x: Tensor, *args: Any) -> Tensor:
    packed, bias = _checked(x, args)
    out = linear_by_blocks(x.reshape(x.shape[:-1].numel(), packed.k), packed, bias)
    return out.resize_(output_shape(x.shape, packed.n))  # a view may not be written in place


def _cuda(x: Tensor, *args: Any) -> Tensor:
    if not supports(x.device):
        return _blocks(x, *args)
    from marlin_w4a16.kernels.linear import linear as fused  # Triton is on Linux only
    from marlin_w4a16.kernels.linear import linear_into

    packed, bias = _checked(x, args)
    if is_adjacent(*packed.tensors, bias) and packed.n and packed.k:
        out = x.new_empty(output_shape(x.shape, packed.n))
        linear_into(x, *packed.tensors, bias, packed.n, packed.k, packed.group, packed.kind, out)
        return out
    out = fused(x.reshape(x.shape[:-1].numel(), packed.k), packed, bias)
    return out.resize_(output_shape(x.shape, packed.n))  # a view may not be written in place


def _fake_grad_input(grad: Tensor, *weight: Any) -> Tensor:
    inductor.register()
    packed = checked_weight("linear_grad_input", grad, "n", weight)
    return grad.new_empty(output_shape(grad.shape, packed.k))


def _grad_input(grad: Tensor, *weight: Any) -> Tensor:
    packed = checked_weight("linear_grad_input", grad, "n", weight)
    out = linear_grad_input(grad.reshape(grad.shape[:-1].numel(), packed.n), packed)
    return out.resize_(output_shape(grad.shape, packed.k))


def _cuda_grad_input(grad: Tensor, *weight: Any) -> Tensor:
    if not supports(grad.device) or grad.dtype == torch.float32:
        return _grad_input(grad, *weight)
    from marlin_w4a16.kernels.grad_input import grad_input_into  # Triton is on Linux only
    from marlin_w4a16.kernels.grad_input import linear_grad_input as fused

    packed = checked_weight("linear_grad_input", grad, "n", weight)
    if is_adjacent(*packed.tensors) and packed.n and packed.k:
        out = grad.new_empty(output_shape(grad.shape, packed.k))
        grad_input_into(grad, *packed.tensors, packed.n, packed.k, packed.group, packed.kind, out)
        return out
    out = fused(grad.reshape(grad.shape[:-1].numel(), packed.n), packed)
    return out.resize_(output_shape(grad.shape, packed.k))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, bias = split_weight(inputs[1:])  # x is not kept
    save(ctx, weight, output)
    ctx.bias_dtype = bias[0].dtype if bias and bias[0] is not None else None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants_x, *_, wants_bias = ctx.needs_input_grad
    weight = saved(ctx)
    grad_x = torch.ops.marlin_w4a16.linear_grad_input(grad, *weight) if wants_x else None
    grad_bias = _bias_gradient(grad, ctx.bias_dtype) if wants_bias else None
    return (grad_x, *[None for _ in weight], grad_bias)


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight = saved(ctx)
    return (torch.ops.marlin_w4a16.linear(grad, *weight, None), *[None for _ in weight])


_LINEAR = f"linear(Tensor x, {weight_schema()}, Tensor? bias) -> Tensor"
_GRAD_INPUT = f"linear_grad_input(Tensor grad, {weight_schema()}) -> Tensor"
register(_LINEAR, _blocks, _cuda, _fake, _backward, _setup)
register(_GRAD_INPUT, _grad_input, _cuda_grad_input, _fake_grad_input, _backward_grad_input, _setup)
autocast("linear")
