"""How Inductor calls the ops: its wrapper calls the launches itself, and allocates what they write.

Left to itself it calls ``torch.ops.marlin_w4a16``, and so the dispatcher, each time. Read in torch 2.11 and 2.13.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch

from marlin_w4a16.fake_impls.library import split_weight
from marlin_w4a16.kernels.target import supports


def register() -> None:
    """Registers the lowerings, once Inductor is loaded: that takes seconds, and not all who ask for a fake compile."""
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    ops, known = torch.ops.marlin_w4a16, getattr(lowering, "lowerings", None)
    for name, lower in (("linear", _linear), ("linear_grad_input", _grad_input), ("moe", _moe)):
        op = getattr(ops, name).default
        if known is not None and op not in known:
            lowering.register_lowering(op, type_promotion_kind=None)(lower)


def _linear(x: Any, *args: Any) -> Any:
    weight, (bias,) = split_weight(args)
    *tensors, n, k, group, kind, _, _ = weight
    if not (_launches(x, (*tensors, bias)) and n and k):
        return _dispatched(torch.ops.marlin_w4a16.linear.default, x, *args)
    return _call("linear", [x], [*tensors, bias], (n, k, group, kind), n)


def _grad_input(grad: Any, *weight: Any) -> Any:
    *tensors, n, k, group, kind, _, _ = weight
    if not (_launches(grad, tensors) and n and k):
        return _dispatched(torch.ops.marlin_w4a16.linear_grad_input.default, grad, *weight)
    return _call("grad_input", [grad], tensors, (n, k, group, kind), k)


def _moe(x: Any, *args: Any) -> Any:
    topk_weights, topk_ids, *others = args
    first, behind = split_weight(others)
    second, (bias13, bias2, *activation, weight_on_input, expert_map) = split_weight(behind)
    *tensors13, n13, k13, group13, kind13, _, _ = first
    *tensors2, n2, k2, group2, kind2, _, _ = second
    tensors = [*tensors13, *tensors2, bias13, bias2, expert_map]
    if not (_launches(x, tensors) and n2 and k2 and k13 and topk_ids.get_size()[1]):
        return _dispatched(torch.ops.marlin_w4a16.moe.default, x, *args)
    formats = (n13, k13, kind13, group13), (n2, k2, kind2, group2)
    return _call("moe", [x, topk_weights, topk_ids], tensors, (*formats, tuple(activation), weight_on_input), n2)


def _dispatched(op: Any, *args: Any) -> Any:
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def _call(op: str, inputs: list[Any], tensors: list[Any], constants: tuple[Any, ...], width: int) -> Any:
    """The result ``[..., width]`` of ``kernels.{op}.{op}_into`` for inputs, other tensors or None, and constants."""
    from torch._inductor import ir

    inputs = [ir.ExternKernel.require_contiguous(value) for value in inputs]
    size = [*inputs[0].get_size()[:-1], width]
    strides = ir.FlexibleLayout.contiguous_strides(size)
    layout = ir.FixedLayout(inputs[0].get_device(), inputs[0].get_dtype(), size, strides)
    missing = tuple(at for at, tensor in enumerate((*inputs, *tensors)) if tensor is None)
    given = [*inputs, *[tensor for tensor in tensors if tensor is not None]]
    node = _node(op, missing)(layout, given, constants, python_kernel_name=f"{op}_into")
    return ir.TensorBox.create(node)


@functools.cache
def _node(op: str, missing: tuple[int, ...]) -> Any:
    """The node of such a call; ``missing``: the places of the tensors that are None."""
    from torch._inductor import ir

    class Call(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            wrapper.add_import_once(f"from marlin_w4a16.kernels.{op} import {op}_into")
            super().codegen(wrapper)

        def codegen_args(self) -> list[str]:
            args = list(super().codegen_args())
            for at in missing:
                args.insert(at, "None")
            return args

    return Call


def _launches(x: Any, tensors: Sequence[Any]) -> bool:
    """Whether the kernels serve the device and dtype of an input and the layout of what is beside it, in Python."""
    from torch._inductor.virtualized import V

    device, served = x.get_device(), x.get_dtype() in (torch.bfloat16, torch.float16)
    python = not (V.graph.cpp_wrapper or V.graph.aot_mode)
    laid_out = all(_is_contiguous(tensor) for tensor in tensors if tensor is not None)
    return python and served and device.type == "cuda" and supports(device) and laid_out


def _is_contiguous(tensor: Any) -> bool:
    """Whether the elements of a tensor are known to be adjacent."""
    layout = tensor.maybe_get_layout()
    return layout is not None and bool(layout.is_contiguous())
