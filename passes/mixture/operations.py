"""What operations of traced graphs are called, whichever way they are spelled, and what kind each is of."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from marlin_w4a16.passes.graph.purity import written_by
from marlin_w4a16.passes.mixture.pointwise import ARITHMETIC, POINTWISE

MOVES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "permute",
     "movedim", "moveaxis", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to", "contiguous",
     "clone", "detach", "chunk", "split", "tensor_split", "unbind", "select", "narrow", "t", "view_as", "reshape_as",
     "flip", "roll", "getitem"}
)  # fmt: skip
CASTS = frozenset(
    {"to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool",
     "cpu", "cuda"}
)  # fmt: skip
# Of integers, each by itself.
COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
INTEGERS = frozenset(
    {"add", "sub", "rsub", "mul", "floor_divide", "remainder", "fmod", "neg", "abs", "clamp", "clamp_min", "clamp_max",
     "minimum", "maximum", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "logical_and", "logical_or",
     "logical_not", "where", "masked_fill"} | COMPARISONS
)  # fmt: skip
LIKE = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
)  # fmt: skip
MADE = frozenset({"arange", "zeros", "ones", "full", "empty", "tensor", "scalar_tensor"})
SIZES = frozenset({"size", "numel", "dim", "getattr", "ndimension", "len"})
OTHERS = frozenset(
    {"sort", "argsort", "histc", "cumsum", "index_select", "index_add", "index_copy", "scatter", "sum", "setitem",
     "einsum"}
)  # fmt: skip
_ALIASES = {
    "multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "truediv": "div", "negative": "neg",
    "clip": "clamp", "absolute": "abs", "floordiv": "floor_divide", "mod": "remainder", "greater": "gt", "less": "lt",
    "greater_equal": "ge", "less_equal": "le", "not_equal": "ne", "and_": "bitwise_and", "or_": "bitwise_or",
    "xor": "bitwise_xor", "inv": "bitwise_not", "invert": "bitwise_not",
}  # fmt: skip
_IN_PLACE = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ifloordiv": "floor_divide", "imod": "remainder",
}  # fmt: skip
_KNOWN = MOVES | CASTS | INTEGERS | LIKE | MADE | SIZES | OTHERS | POINTWISE | ARITHMETIC.keys() | _ALIASES.keys()


def _callables() -> dict[Callable[..., Any], tuple[str, bool]]:
    found: dict[Callable[..., Any], tuple[str, bool]] = {getattr: ("getattr", False), len: ("len", False)}
    for home in (torch.nn.functional, torch.functional, operator, torch):
        for name in _KNOWN:
            for spelled, written in ((name, False), (f"{name}_", True)):
                function = getattr(home, spelled, None)
                if callable(function) and not isinstance(function, type) and not (home is operator and written):
                    found[function] = (_ALIASES.get(name, name), written)
        if home is operator:
            found |= {getattr(operator, name): (to, True) for name, to in _IN_PLACE.items()}
            found[operator.setitem] = ("setitem", True)
    return found


_CALLABLES = _callables()


def operation(node: fx.Node) -> tuple[str, bool]:
    """The name of what a node does, and whether it writes to its first argument.

    A function is known by what it is, not by what it calls itself; of one that is not known the name is shown as it is.
    """
    if node.op == "call_method":
        name = str(node.target)
        if name.startswith("__") and name.endswith("__"):
            name = name.strip("_")
        written = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        name = _IN_PLACE.get(name, name.removesuffix("_") if written else name)
        return _ALIASES.get(name, name), written or name == "setitem"
    unknown = getattr(node.target, "__name__", str(node.target)), True
    if node.op != "call_function" or "out" in node.kwargs:
        return f"{node.op} {unknown[0]}", True
    name, written = _CALLABLES.get(node.target, unknown)  # type: ignore[arg-type]
    if node.target not in _CALLABLES:
        name = f"{name}, which is not known here"
    return name, written or bool(written_by(node))
