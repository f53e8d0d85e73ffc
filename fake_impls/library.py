"""What the ops of ``torch.ops.marlin_w4a16`` share: the library, the packed weight in a schema, the checks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from marlin_w4a16.kernels.fp4 import GROUP_SIZES
from marlin_w4a16.kernels.layout import LAYOUTS, PackedFP4, packed_shapes
from marlin_w4a16.kernels.scale_bytes import SCALE_KINDS

NAMESPACE = "marlin_w4a16"
# Part of every call: raise it when a schema, fake or layout changes its meaning, or what Inductor writes into its files
# (`linear_into`, `grad_input_into`, `moe_into`), so that no compile cache of an older version is met again.
CONTRACT = 3
_WEIGHT = "Tensor words, Tensor scales, Tensor multiplier, int n, int k, int group, str kind, str layout, int contract"
_WEIGHT_SIZE = _WEIGHT.count(",") + 1
_AUTOCAST_KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_library = torch.library.Library(NAMESPACE, "DEF")


def weight_schema(of: str = "") -> str:
    """The arguments that are a packed weight; ``of`` ends their names where an op has several."""
    return ", ".join(argument + of for argument in _WEIGHT.split(", "))


def register(
    schema: str,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., None] | None = None,
) -> None:
    """Defines an op that accepts inputs of any strides and returns contiguous outputs.

    It may have a gradient; ``setup`` keeps what that needs.
    """
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    op = schema.partition("(")[0]
    _library.impl(op, cpu, "CPU")
    _library.impl(op, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{op}", backward, setup_context=setup, lib=_library)


def weight_args(packed: PackedFP4) -> tuple[Any, ...]:
    """A packed weight as the arguments of `weight_schema`."""
    return (packed.words, packed.scales, packed.multiplier, *format_args(packed))


def packed_of(weight: Sequence[Any]) -> PackedFP4:
    """The inverse of `weight_args`."""
    words, scales, multiplier, n, k, group, kind, layout, _ = weight
    return PackedFP4(words, scales, multiplier, n, k, kind, group, layout)


def split_weight(args: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of the packed weight with which some begin, and those behind it."""
    return tuple(args[:_WEIGHT_SIZE]), tuple(args[_WEIGHT_SIZE:])


def format_args(packed: PackedFP4) -> tuple[int, int, int, str, str, int]:
    """The arguments of `weight_schema` that are not tensors."""
    return packed.n, packed.k, packed.group, packed.kind, packed.layout, CONTRACT


def checked_weight(op: str, x: Tensor, columns: str, weight: tuple[Any, ...]) -> PackedFP4:
    """The packed weight of a call whose input ``x`` has ``n`` or ``k`` (``columns``) columns.

    Raises:
        ValueError: says which argument does not fit, what was found and what was expected.
    """
    packed = checked_packed(op, x.device, weight)
    width = packed.n if columns == "n" else packed.k
    expect(x.dtype in DTYPES, op, "input", x.dtype, f"one of {DTYPES}")
    expect(x.ndim >= 1, op, "input", "a scalar", f"[..., {columns}]")
    expect(x.shape[-1] == width, op, "input", f"shape {tuple(x.shape)}", f"[..., {columns} = {width}]")
    return packed


def checked_packed(
    op: str, device: torch.device, weight: tuple[Any, ...], of: str = "", lead: tuple[int, ...] = ()
) -> PackedFP4:
    """The packed weight of a call on a device.

    Args:
        op: its name.
        device: that of its input.
        weight: the arguments of `weight_schema`.
        of: the end of their names.
        lead: how many matrices there are.

    Raises:
        ValueError: says which argument does not fit, what was found and what was expected.
    """
    words, scales, multiplier, n, k, group, kind, layout, contract = weight
    expect(contract == CONTRACT, op, f"contract{of}", contract, CONTRACT)
    expect(layout in LAYOUTS, op, f"layout{of}", repr(layout), f"one of {LAYOUTS}")
    expect(kind in SCALE_KINDS, op, f"kind{of}", repr(kind), f"one of {SCALE_KINDS}")
    expect(group in GROUP_SIZES, op, f"group{of}", group, f"one of {GROUP_SIZES}")
    shapes = packed_shapes(n, k, group)
    dtypes = (torch.int32, torch.uint8, torch.float32)
    for name, t, shape, dtype in zip(
        ("words", "scales", "multiplier"), (words, scales, multiplier), shapes, dtypes, strict=True
    ):
        expect(t.dtype == dtype, op, f"{name}{of}", t.dtype, dtype)
        expect(tuple(t.shape) == (*lead, *shape), op, f"{name}{of}", f"shape {tuple(t.shape)}", (*lead, *shape))
        expect(t.device == device, op, f"{name}{of}", f"device {t.device}", f"that of the input, {device}")
    return packed_of(weight)


def is_adjacent(*tensors: Tensor | None) -> bool:
    """Whether the elements of each tensor are adjacent, as calls that are made again read them."""
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    """Keeps arguments of an op, tensors or not, for its gradient, and nothing of its output."""
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]


def saved(ctx: Any) -> list[Any]:
    """What `save` has kept."""
    args = list(ctx.rest)
    for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
        args[place] = tensor
    return args


def autocast(op: str, back: bool = False) -> None:
    """Makes an op cast its floating inputs under autocast as ``F.linear`` does; the packed weight stays.

    ``back``: only x is cast, and the result has its dtype again.
    """
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    for device_type, key in _AUTOCAST_KEYS.items():
        _library.impl(op, functools.partial(_cast, overload, device_type, back), key)


def _cast(overload: Any, device_type: str, back: bool, x: Tensor, *rest: Any) -> Tensor:
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        lowered, stay = _lowered(x, device_type, dtype), len(rest) if back else 3  # words, scales and multiplier
        result: Tensor = overload(lowered, *rest[:stay], *(_lowered(t, device_type, dtype) for t in rest[stay:]))
    return result.to(x.dtype) if back else result


def _lowered(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or value.device.type != device_type or value.dtype not in DTYPES:
        return value
    return value.to(dtype)


def expect_no_tangent(op: str, *inputs: Tensor | None) -> None:
    """Raises a NotImplementedError if one of the inputs carries a tangent of forward-mode differentiation.

    PyTorch would drop it: an op that is registered with a backward formula has no place for a forward one.
    """
    if any(t is not None and unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError(
            f"{NAMESPACE}::{op}: found an input with a tangent of torch.autograd.forward_ad, expected none: the op has "
            "backward formulas only. Enter the level inside the compiled function, which then keeps its products as "
            "traced, or use torch.func.jvp"
        )


def expect(condition: bool, op: str, argument: str, found: object, expected: object) -> None:
    """Raises a ValueError that names op and argument, what was found and what was expected, unless ``condition``."""
    if not condition:
        raise ValueError(f"{NAMESPACE}::{op}: {argument}: found {found}, expected {expected}")
