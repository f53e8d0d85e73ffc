"""``marlin_w4a16::linear``: ``x @ weight.T + bias`` from a packed FP4 weight, and its gradient."""

from typing import Any, cast

import torch
from torch import Tensor

from marlin_w4a16.fake_impls import inductor
from marlin_w4a16.fake_impls.eager import again, fits, is_plain, keep, needs_gradient, new_output, proof_of
from marlin_w4a16.fake_impls.library import (
    DTYPES,
    autocast,
    checked_weight,
    expect,
    expect_no_tangent,
    register,
    save,
    saved,
    split_weight,
    weight_args,
    weight_schema,
)
from marlin_w4a16.kernels.blocks.dequantize import linear_by_blocks, linear_grad_input
from marlin_w4a16.kernels.layout import PackedFP4
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
            if needs_gradient(x, bias):
                weight = packed.words, packed.scales, packed.multiplier
                return cast(Tensor, _Linear.apply(x, *weight, bias, packed))
            return _launched(x, packed, bias)
    result: Tensor = torch.ops.marlin_w4a16.linear(x, *weight_args(packed), bias)
    return result


def _launched(x: Tensor, packed: PackedFP4, bias: Tensor | None) -> Tensor:
    """A call whose arguments were proved to be right."""
    from marlin_w4a16.kernels.linear import bound, linear_into  # Triton is on Linux only

    out, p = new_output(x, packed.n), packed
    linear_into(x, p.words, p.scales, p.multiplier, bias, p.n, p.k, p.group, p.kind, out)
    launch = bound(x, packed, bias)
    if launch is not None:
        keep(x, packed, bias, out, launch)
    return out


class _Linear(torch.autograd.Function):
    """The gradient of a plain call, without the dispatcher; that of a gradient goes through the ops."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        *weight, bias, packed = args
        ctx.save_for_backward(*weight)
        ctx.packed, ctx.bias_dtype = packed, None if bias is None else bias.dtype
        return linear(x, packed, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wants_x, *_, wants_bias, _ = ctx.needs_input_grad
        _ = ctx.saved_tensors  # raises where one was written to since
        grad_x = _gradient(grad, ctx.packed) if wants_x else None
        return grad_x, None, None, None, _bias_gradient(grad, ctx.bias_dtype) if wants_bias else None, None


def _gradient(grad: Tensor, packed: PackedFP4) -> Tensor:
    """``grad @ weight``, by the op where something would see it, as a gradient of it does."""
    proof = proof_of(packed) if is_plain(grad) and not torch.is_grad_enabled() else None
    if proof is None or proof.device != grad.get_device():
        result: Tensor = torch.ops.marlin_w4a16.linear_grad_input(grad, *weight_args(packed))
        return result
    from marlin_w4a16.kernels.grad_input import linear_grad_input as launched  # Triton is on Linux only

    return launched(grad.reshape(-1, packed.n), packed).view(output_shape(grad.shape, packed.k))


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

    packed, bias = _checked(x, args)
    out = fused(x.reshape(x.shape[:-1].numel(), packed.k), packed, bias)
    return out.resize_(output_shape(x.shape, packed.n))  # a view may not be written in place


def _fake_grad_input(grad: Tensor, *weight: Any) -> Tensor:
    packed = checked_weight("linear_grad_input", grad, "n", weight)
    return grad.new_empty(output_shape(grad.shape, packed.k))


def _grad_input(grad: Tensor, *weight: Any) -> Tensor:
    packed = checked_weight("linear_grad_input", grad, "n", weight)
    out = linear_grad_input(grad.reshape(grad.shape[:-1].numel(), packed.n), packed)
    return out.resize_(output_shape(grad.shape, packed.k))


def _cuda_grad_input(grad: Tensor, *weight: Any) -> Tensor:
    if not supports(grad.device) or grad.dtype == torch.float32:
        return _grad_input(grad, *weight)
    from marlin_w4a16.kernels.grad_input import linear_grad_input as fused  # Triton is on Linux only

    packed = checked_weight("linear_grad_input", grad, "n", weight)
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
