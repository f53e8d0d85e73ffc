"""``marlin_w4a16::moe``: a mixture of experts from packed FP4 weights, and its gradients."""

from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.fake_impls.library import (
    AUTOCAST_KEYS,
    DTYPES,
    NAMESPACE,
    checked_packed,
    define,
    expect,
    library,
    weight_args,
    weight_schema,
)
from marlin_w4a16.fake_impls.linear import output_shape
from marlin_w4a16.kernels.activation import FUNCTIONS, Activation
from marlin_w4a16.kernels.blocks.experts import moe_by_blocks, moe_gradients
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.target import supports

_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_ARGUMENTS = (
    f"Tensor x, Tensor topk_weights, Tensor topk_ids, {weight_schema('13')}, {weight_schema('2')}, Tensor? bias13, "
    "Tensor? bias2, str function, bool gated, float alpha, float? gate_limit, float? up_limit, float up_offset, "
    "bool weight_on_input, Tensor? expert_map"
)
_W13, _W2 = slice(3, 12), slice(12, 21)  # where the weights stand among them
_BIASES, _ACTIVATION = slice(21, 23), slice(23, 29)

define(f"moe({_ARGUMENTS}) -> Tensor")
define(f"moe_grad(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")


def moe(
    x: Tensor,
    w13: PackedFP4,
    w2: PackedFP4,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: Activation,
    bias13: Tensor | None = None,
    bias2: Tensor | None = None,
    weight_on_input: bool = False,
    expert_map: Tensor | None = None,
) -> Tensor:
    """The weighted sum of what the chosen experts make of each token.

    Args:
        x: ``[tokens, hidden]``, float16, bfloat16 or float32, any strides.
        w13: gate and up of each expert (or up alone), packed by `pack_experts`: ``[experts, rows, hidden]``.
        w2: down, ``[experts, hidden, intermediate]``.
        topk_weights: ``[tokens, k]``, floating; applied in float32, after the second product and its bias.
        topk_ids: ``[tokens, k]``, integers. What is no expert (-1, or their number and more) contributes nothing.
        activation: what stands between the products; its result is rounded to the dtype of x.
        bias13: ``[experts, rows]`` in the order of ``w13`` (`pack_bias`), or None.
        bias2: ``[experts, hidden]`` or None.
        weight_on_input: multiply the input of an expert by its routing weight instead of the output.
        expert_map: ``[all experts]``, integers: the place of each expert among these, or -1; None for the same places.

    Returns:
        ``[tokens, hidden]`` in the dtype of x: float32 sums, rounded once, equal bits on every run. Differentiable in
        x, the routing weights and the biases.
    """
    result: Tensor = torch.ops.marlin_w4a16.moe(
        x,
        topk_weights,
        topk_ids,
        *weight_args(w13),
        *weight_args(w2),
        bias13,
        bias2,
        *activation_args(activation),
        weight_on_input,
        expert_map,
    )
    return result


def activation_args(activation: Activation) -> tuple[str, bool, float, float | None, float | None, float]:
    """An activation as the arguments of the op."""
    a = activation
    return a.function, a.gated, a.alpha, a.gate_limit, a.up_limit, a.up_offset


def _checked(op: str, args: tuple[Any, ...]) -> Experts:
    x, topk_weights, topk_ids = args[:3]
    bias13, bias2 = args[_BIASES]
    function, *numbers = args[_ACTIVATION]
    weight_on_input, expert_map = args[29:]
    expect(x.dtype in DTYPES, op, "x", x.dtype, f"one of {DTYPES}")
    expect(x.ndim == 2, op, "x", f"shape {tuple(x.shape)}", "[tokens, hidden]")
    expect(args[3].ndim == 4, op, "words13", f"shape {tuple(args[3].shape)}", "[experts, ...]")
    lead = tuple(args[3].shape[:1])
    w13 = checked_packed(op, x.device, args[_W13], "13", lead)
    w2 = checked_packed(op, x.device, args[_W2], "2", lead)
    expect(function in FUNCTIONS, op, "function", repr(function), f"one of {FUNCTIONS}")
    activation = Activation(function, *numbers)
    rows = w2.k * (2 if activation.gated else 1)
    expect(w13.k == x.shape[1], op, "x", f"shape {tuple(x.shape)}", f"[tokens, {w13.k}]")
    expect(w13.n == rows, op, "n13", w13.n, f"{rows}, for {w2.k} columns of the second product")
    expect(topk_ids.dtype in _ID_DTYPES, op, "topk_ids", topk_ids.dtype, f"one of {_ID_DTYPES}")
    expect(topk_weights.dtype in DTYPES, op, "topk_weights", topk_weights.dtype, f"one of {DTYPES}")
    fits = topk_ids.ndim == 2 and topk_ids.shape[0] == x.shape[0]
    expect(fits, op, "topk_ids", f"shape {tuple(topk_ids.shape)}", f"[{x.shape[0]}, k]")
    expect(topk_weights.shape == topk_ids.shape, op, "topk_weights", tuple(topk_weights.shape), tuple(topk_ids.shape))
    for name, t, width in (("bias13", bias13, w13.n), ("bias2", bias2, w2.n)):
        if t is not None:
            expect(tuple(t.shape) == (*lead, width), op, name, f"shape {tuple(t.shape)}", (*lead, width))
            expect(t.dtype in DTYPES, op, name, t.dtype, f"one of {DTYPES}")
    if expert_map is not None:
        expect(expert_map.ndim == 1, op, "expert_map", f"shape {tuple(expert_map.shape)}", "[all experts]")
        expect(expert_map.dtype in _ID_DTYPES, op, "expert_map", expert_map.dtype, f"one of {_ID_DTYPES}")
    given = {"topk_weights": topk_weights, "topk_ids": topk_ids, "bias13": bias13, "bias2": bias2, "map": expert_map}
    for name, t in given.items():
        if t is not None:
            expect(t.device == x.device, op, name, f"device {t.device}", f"that of the input, {x.device}")
    return Experts(w13, w2, activation, bias13, bias2, weight_on_input)


def _fake(*args: Any) -> Tensor:
    x: Tensor = args[0]
    return x.new_empty(output_shape(x.shape, _checked("moe", args).w2.n))


def _blocks(*args: Any) -> Tensor:
    return moe_by_blocks(args[0], _checked("moe", args), args[1], args[2], args[-1])


def _cuda(*args: Any) -> Tensor:
    x = args[0]
    if not supports(x.device) or x.dtype == torch.float32:
        return _blocks(*args)
    from marlin_w4a16.kernels.moe import moe as fused  # Triton is on Linux only

    return fused(x, _checked("moe", args), args[1], args[2], args[-1])


def _grad(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts = _checked("moe_grad", args)
    wanted = output_shape(args[0].shape, experts.w2.n)
    expect(tuple(grad.shape) == wanted, "moe_grad", "grad", f"shape {tuple(grad.shape)}", wanted)
    return moe_gradients(grad, args[0], experts, args[1], args[2], args[-1])


def _fake_grad(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    experts, x, weights = _checked("moe_grad", args), args[0], args[1]
    biases = [x.new_empty(0) if b is None else b.new_empty(b.shape) for b in (experts.bias13, experts.bias2)]
    return x.new_empty(x.shape), weights.new_empty(weights.shape), *biases


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = list(ctx.rest)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        args[place] = tensor
    found = torch.ops.marlin_w4a16.moe_grad(grad, *args)
    gradients: list[Tensor | None] = [None] * len(args)
    for place, tensor in zip((0, 1, _BIASES.start, _BIASES.start + 1), found, strict=True):
        if ctx.needs_input_grad[place]:
            gradients[place] = tensor
    return tuple(gradients)


def _setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Its gradient is an error."""


def _no_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(f"{NAMESPACE}::moe: its gradient cannot be differentiated again (create_graph=True)")


def _autocast(device_type: str) -> None:
    def cast(x: Tensor, *rest: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            lowered = x.to(dtype) if x.device.type == device_type and x.dtype in DTYPES else x
            result: Tensor = torch.ops.marlin_w4a16.moe.default(lowered, *rest)
        return result.to(x.dtype)  # as the experts of transformers, which autocast does not know

    library.impl("moe", cast, AUTOCAST_KEYS[device_type])


for _op, _forward, _gpu, _meta, _derivative, _context in (
    ("moe", _blocks, _cuda, _fake, _backward, _setup),
    ("moe_grad", _grad, _grad, _fake_grad, _no_backward, _setup_nothing),
):
    library.impl(_op, _forward, "CPU")
    library.impl(_op, _gpu, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_op}", _meta, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::{_op}", _derivative, setup_context=_context, lib=library)
for _device in AUTOCAST_KEYS:
    _autocast(_device)
