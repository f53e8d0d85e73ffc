"""How traced functions spell products of an input and a weight."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from marlin_w4a16.passes.find import equation
from marlin_w4a16.passes.find.equation import Equation
from marlin_w4a16.passes.graph.torch_private import GROUPED_MM


@dataclass(frozen=True, slots=True)
class Spelling:
    """How a traced function spells a product of x and a weight.

    Attributes:
        name: for reports.
        arguments: the names of its arguments, in their positions.
        ways: which of them may be x and the weight, and the equation of operands of so many dimensions.
        added: the name of what is added to the product: a ``bias`` of the rows, or else anything that fits.
        fixed: arguments that must have one of the given values.
    """

    name: str
    arguments: tuple[str, ...]
    ways: tuple[tuple[str, str, Callable[[int, int], Equation]], ...]
    added: str | None = None
    fixed: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def _two(name: str, first: str, second: str, *before: str, added: str | None = None) -> Spelling:
    ways = ((first, second, equation.matmul), (second, first, equation.matmul_left))
    return Spelling(name, (*before, first, second), ways, added)


_LINEAR = Spelling("F.linear", ("input", "weight", "bias"), (("input", "weight", equation.linear),), "bias")
_MATMUL = _two("matmul", "input", "other")
_INNER = Spelling("inner", ("input", "other"), (("input", "other", equation.inner),))
CONV1D = Spelling(
    "conv1d",
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    (("input", "weight", equation.conv1d),),
    "bias",
    {"stride": (1, (1,), [1]), "padding": (0, (0,), [0], "valid", "same"), "groups": (1,)},
)
CONV2D = Spelling(
    "conv2d",
    CONV1D.arguments,
    (("input", "weight", equation.conv2d),),
    "bias",
    {"stride": (1, (1, 1), [1, 1]), "padding": (0, (0, 0), [0, 0], "valid", "same"), "groups": (1,)},
)
TENSORDOT = Spelling("tensordot", ("a", "b", "dims"), ())
EINSUM = Spelling("einsum", ("equation", "operands", "second"), ())
_MM, _MV, _BMM = _two("mm", "input", "mat2"), _two("mv", "input", "vec"), _two("bmm", "input", "mat2")
_ADDMV = _two("addmv", "mat", "vec", "input", added="input")
_ADDMM = _two("addmm", "mat1", "mat2", "input", added="input")
_BADDBMM = _two("baddbmm", "batch1", "batch2", "input", added="input")
GROUPED = Spelling(
    "grouped_mm",
    ("input", "weight", "offs", "bias", "out_dtype"),
    (("input", "weight", equation.matmul),),
    fixed={"bias": (None,), "out_dtype": (None,)},
)
CONSUMERS: dict[Callable[..., Any] | str, Spelling] = {
    torch.nn.functional.linear: _LINEAR,
    operator.matmul: _MATMUL,
    "__matmul__": _MATMUL,
    torch.conv1d: CONV1D,
    torch.conv2d: CONV2D,
    torch.functional.tensordot: TENSORDOT,
    torch.functional.einsum: EINSUM,
    GROUPED_MM: GROUPED,
    "transformers.grouped_mm_fallback": GROUPED,
    **{
        spelled: spelling
        for spelling in (_MATMUL, _MM, _MV, _BMM, _ADDMV, _ADDMM, _BADDBMM, _INNER)
        for spelled in (spelling.name, getattr(torch, spelling.name))
    },
}
