"""``marlin_w4a16::moe``: a mixture of experts from packed FP4 weights, and its gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.fake_impls import inductor
from marlin_w4a16.fake_impls.eager import fits, is_plain, needs_gradient, new_output, proof_of
from marlin_w4a16.fake_impls.library import (
    DTYPES,
    NAMESPACE,
    autocast,
    checked_packed,
    expect,
    expect_no_tangent,
    is_adjacent,
    packed_of,
    register,
    save,
    saved,
    split_weight,
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
            For experts that are shared out among GPUs; nothing here passes one.

    Returns:
        ``[tokens, hidden]`` in the dtype of x: float32 sums, rounded once, equal bits on every run. Differentiable in
        x, the routing weights and the biases.
    """
    if is_plain(x) and not needs_gradient(x, topk_weights, bias13, bias2):
        experts = Experts(w13, w2, activation, bias13, bias2, weight_on_input)
        if _is_right(x, experts, topk_weights, topk_ids, expert_map):
            return _launched(x, experts, topk_weights, topk_ids, expert_map, new_output(x, w2.n))
    weights = (*weight_args(w13), *weight_args(w2))
    result: Tensor = torch.ops.marlin_w4a16.moe(
        x, topk_weights, topk_ids, *weights, bias13, bias2, *activation_args(activation), weight_on_input, expert_map
    )
    return result


def _is_right(x: Tensor, experts: Experts, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> bool:
    """Whether a plain call is one of what `_checked` accepts, with something to do."""
    w13, w2, device, shape = experts.w13, experts.w2, x.get_device(), topk_ids.shape
    count = w13.words.shape[0]
    return (
        _is_on(w13, device) and _is_on(w2, device)
        and w13.words.ndim == 4 == w2.words.ndim and w2.words.shape[0] == count
        and w13.n == (2 * w2.k if experts.activation.gated else w2.k) and w2.n > 0
        and x.ndim == 2 and x.shape[1] == w13.k and len(shape) == 2 and shape[0] == x.shape[0]
        and x.numel() > 0 and topk_ids.numel() > 0 and shape == topk_weights.shape
        and type(topk_ids) is Tensor and topk_ids.get_device() == device and topk_ids.dtype in _ID_DTYPES
        and fits(topk_weights, shape, device)
        and fits(experts.bias13, (count, w13.n), device) and fits(experts.bias2, (count, w2.n), device)
        and expert_map is None
    )  # fmt: skip


def _is_on(packed: PackedFP4, device: int) -> bool:
    proof = proof_of(packed)
    return proof is not None and proof.device == device


def _launched(
    x: Tensor, experts: Experts, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, out: Tensor
) -> Tensor:
    """A call whose arguments were proved to be right, on tensors of weights that are contiguous."""
    from marlin_w4a16.kernels.moe import moe_into  # Triton is on Linux only

    w13, w2 = experts.w13, experts.w2
    moe_into(
        x, topk_weights, topk_ids, *w13.tensors, *w2.tensors, experts.bias13, experts.bias2, expert_map,
        (w13.n, w13.k, w13.kind, w13.group), (w2.n, w2.k, w2.kind, w2.group), activation_args(experts.activation),
        experts.weight_on_input, out,
    )  # fmt: skip
    return out


def activation_args(activation: Activation) -> tuple[str, bool, float, float | None, float | None, float]:
    """An activation as the arguments of the op."""
    a = activation
    return a.function, a.gated, a.alpha, a.gate_limit, a.up_limit, a.up_offset


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of the op by name: values, or what stands for them, such as the nodes of a graph.

    Attributes:
        w13, w2: the arguments of `weight_schema`.
        x, topk_weights, topk_ids, activation, bias13, bias2, weight_on_input, expert_map: see `moe`.
    """

    x: Any
    topk_weights: Any
    topk_ids: Any
    w13: tuple[Any, ...]
    w2: tuple[Any, ...]
    bias13: Any
    bias2: Any
    activation: Activation
    weight_on_input: Any
    expert_map: Any


def arguments_of(args: Sequence[Any]) -> Arguments:
    """The arguments of a call, which stand in the order of the schema, by name."""
    x, topk_weights, topk_ids, *others = args
    w13, behind = split_weight(others)
    w2, (bias13, bias2, *activation, weight_on_input, expert_map) = split_weight(behind)
    return Arguments(
        x, topk_weights, topk_ids, w13, w2, bias13, bias2, Activation(*activation), weight_on_input, expert_map
    )


def _checked(op: str, args: tuple[Any, ...]) -> tuple[Tensor, Experts, Tensor, Tensor, Tensor | None]:
    given = arguments_of(args)
    x, topk_weights, topk_ids, expert_map = given.x, given.topk_weights, given.topk_ids, given.expert_map
    bias13, bias2, activation, words = given.bias13, given.bias2, given.activation, packed_of(given.w13).words
    expect_no_tangent(op, x, topk_weights, bias13, bias2)
    expect(x.dtype in DTYPES, op, "x", x.dtype, f"one of {DTYPES}")
    expect(x.ndim == 2, op, "x", f"shape {tuple(x.shape)}", "[tokens, hidden]")
    expect(words.ndim == 4, op, "words13", f"shape {tuple(words.shape)}", "[experts, ...]")
    lead = tuple(words.shape[:1])
    w13 = checked_packed(op, x.device, given.w13, "13", lead)
    w2 = checked_packed(op, x.device, given.w2, "2", lead)
    expect(activation.function in FUNCTIONS, op, "function", repr(activation.function), f"one of {FUNCTIONS}")
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
    tensors = {"topk_weights": topk_weights, "topk_ids": topk_ids, "bias13": bias13, "bias2": bias2, "map": expert_map}
    for name, t in tensors.items():
        if t is not None:
            expect(t.device == x.device, op, name, f"device {t.device}", f"that of the input, {x.device}")
    return x, Experts(w13, w2, activation, bias13, bias2, given.weight_on_input), topk_weights, topk_ids, expert_map


def _fake(*args: Any) -> Tensor:
    inductor.register()
    x, experts, *_ = _checked("moe", args)
    return x.new_empty(output_shape(x.shape, experts.w2.n))


def _blocks(*args: Any) -> Tensor:
    return moe_by_blocks(*_checked("moe", args))


def _cuda(*args: Any) -> Tensor:
    x, experts, *_, expert_map = call = _checked("moe", args)
    if not supports(x.device) or x.dtype == torch.float32:
        return moe_by_blocks(*call)
    beside = experts.bias13, experts.bias2, expert_map
    if is_adjacent(*experts.w13.tensors, *experts.w2.tensors, *beside) and x.numel() and experts.w2.n:
        return _launched(*call, x.new_empty(output_shape(x.shape, experts.w2.n)))
    from marlin_w4a16.kernels.moe import moe as fused  # Triton is on Linux only

    return fused(*call)


def _grad(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, experts, *_ = call = _checked("moe_grad", args)
    wanted = output_shape(x.shape, experts.w2.n)
    expect(tuple(grad.shape) == wanted, "moe_grad", "grad", f"shape {tuple(grad.shape)}", wanted)
    return moe_gradients(grad, *call)


def _fake_grad(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, experts, weights, *_ = _checked("moe_grad", args)
    first, second = (x.new_empty(0) if b is None else b.new_empty(b.shape) for b in (experts.bias13, experts.bias2))
    return x.new_empty(x.shape), weights.new_empty(weights.shape), first, second


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    args = saved(ctx)
    found = torch.ops.marlin_w4a16.moe_grad(grad, *args)
    gradients: list[Tensor | None] = [None] * len(args)
    places = arguments_of(range(len(args)))
    differentiable = places.x, places.topk_weights, places.bias13, places.bias2
    for place, tensor in zip(differentiable, found, strict=True):
        if ctx.needs_input_grad[place]:
            gradients[place] = tensor
    return tuple(gradients)


def _no_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(f"{NAMESPACE}::moe: its gradient cannot be differentiated again (create_graph=True)")


_GRAD = f"moe_grad(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
register(f"moe({_ARGUMENTS}) -> Tensor", _blocks, _cuda, _fake, _backward, save)
register(_GRAD, _grad, _grad, _fake_grad, _no_backward)
autocast("moe", back=True)  # as the experts of transformers, which autocast does not know
