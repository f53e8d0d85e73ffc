"""What operations make of numbers, sizes and shapes alone, and the axes along which moves cut."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.passes.mixture import operations
from marlin_w4a16.passes.mixture.call import Call
from marlin_w4a16.passes.mixture.values import NotUnderstood, Plain, Unwritten, Value

# Moves that may take some of an axis: where the axis stands among their further arguments, and its name.
CUTS = {
    "getitem": (0, ""), "narrow": (0, "dim"), "select": (0, "dim"), "unbind": (0, "dim"), "split": (1, "dim"),
    "chunk": (1, "dim"), "tensor_split": (1, "dim"), "flip": (0, "dims"), "roll": (1, "dims"),
}  # fmt: skip
# Which arguments may change between calls: sizes, and where a range ends. They are read by name, or by place.
_MAY_CHANGE: dict[tuple[str, int], frozenset[object]] = {
    ("arange", 0): frozenset({"end"}), ("arange", 1): frozenset({0}), ("arange", 2): frozenset({1}),
    ("full", 0): frozenset({"size"}), ("full", 1): frozenset({0, "size"}), ("full", 2): frozenset({0}),
}  # fmt: skip
_OF_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floor_divide": operator.floordiv,
    "remainder": operator.mod, "neg": operator.neg,
}  # fmt: skip


def made(name: str, args: list[Any], kwargs: dict[str, Any], call: Call) -> Any:
    """Numbers, and tensors made of them; None: it is not known how, or may be another way for other sizes."""
    if not isinstance(call.example, Tensor):
        if (call.sized and name in ("floor_divide", "remainder")) or (call.sized > 1 and not call.counted):
            return None
        whole = all(isinstance(x, int) for x in args) and not kwargs
        function: Callable[..., Any] | None = _OF_NUMBERS.get(name)
        return function(*args) if whole and function is not None else None
    if name not in operations.MADE or (call.changing & {"fill_value", "start", "step"}):
        return None
    if name in ("tensor", "scalar_tensor") and call.sized:
        return None
    if name in ("full", "arange") and not call.changing <= _MAY_CHANGE[name, min(len(args), 2)]:
        return None
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "layout")}
    at = getattr(torch, name)(*args, **kwargs)
    return Unwritten(at=at) if name == "empty" else Plain(at=at, fixed=not call.sized or name in ("zeros", "ones"))


def part(name: str, args: list[Any]) -> Any:
    """A size, an attribute, or one of several tensors."""
    value = args[0]
    if isinstance(value, tuple):
        index = {"values": 0, "indices": 1}.get(args[1], args[1]) if name == "getattr" else args[1]
        return value[index] if name in ("getattr", "getitem") and isinstance(index, int) else None
    if name == "getattr":
        if args[1] in ("T", "mT"):
            return value.moved(lambda at: getattr(at, args[1]))
        return value.at.shape if args[1] == "shape" else None
    sizes = {"size": value.at.size, "numel": value.at.numel, "dim": value.at.dim, "ndimension": value.at.dim}
    return sizes[name](*args[1:]) if name in sizes else len(value.at)


def cut_axes(name: str, rest: Sequence[Any], kwargs: dict[str, Any], axes: int) -> Iterator[int]:
    """The axes along which a move takes some elements, or changes their order."""
    if name == "getitem":
        index = list(rest[0]) if isinstance(rest[0], tuple) else [rest[0]]
        if Ellipsis in index:
            place = index.index(Ellipsis)
            index[place : place + 1] = [slice(None)] * (axes - sum(part is not None for part in index) + 1)
        real = [part for part in index if part is not None]
        yield from (axis for axis, part in enumerate(real) if part != slice(None))
        return
    position, named = CUTS[name]
    dims = kwargs.get(named, rest[position] if len(rest) > position else 0)
    if name == "flip" and len(rest) > 1:
        dims = rest
    yield from dims if isinstance(dims, list | tuple) else (dims,)


def like(name: str, args: list[Any], kwargs: dict[str, Any], call: Call) -> Value:
    """A tensor of the shape of another one, or of a size."""
    kind, fill = name.removeprefix("new_").removesuffix("_like"), {"zeros": 0.0, "ones": 1.0}
    rest = args[1:]
    shape = args[0].at.shape
    if name.startswith("new_"):
        size = rest[0] if rest and isinstance(rest[0], list | tuple) else kwargs.get("size", rest)
        shape, rest = torch.Size(size), rest[1:]
    if kind == "empty":
        return Unwritten(at=torch.zeros(shape))
    value = fill[kind] if kind in fill else kwargs.get("fill_value", rest[0] if rest else None)
    where = 2 if name.startswith("new_") else 1
    if not isinstance(value, int | float) or (kind not in fill and call.changing & {where, "fill_value"}):
        raise NotUnderstood(f"{name} of what is no number, or one that changes")
    return Plain(at=torch.full(shape, value, dtype=call.example.dtype), fixed=True)
