"""Finds the products of a graph whose weight is computed from constants, and reads each as an equation."""

import dataclasses
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.fake_impls.library import DTYPES
from marlin_w4a16.passes import equation
from marlin_w4a16.passes.constants import Constants, example
from marlin_w4a16.passes.equation import Equation, Matrices, matrices


@dataclass(frozen=True, slots=True)
class Form:
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


def _two(name: str, first: str, second: str, *before: str, added: str | None = None) -> Form:
    ways = ((first, second, equation.matmul), (second, first, equation.matmul_left))
    return Form(name, (*before, first, second), ways, added)


_LINEAR = Form("F.linear", ("input", "weight", "bias"), (("input", "weight", equation.linear),), "bias")
_MATMUL = _two("matmul", "input", "other")
_INNER = Form("inner", ("input", "other"), (("input", "other", equation.inner),))
_CONV1D = Form(
    "conv1d",
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    (("input", "weight", equation.conv1d),),
    "bias",
    {"stride": (1, (1,), [1]), "padding": (0, (0,), [0], "valid", "same"), "groups": (1,)},
)
_CONV2D = Form(
    "conv2d",
    _CONV1D.arguments,
    (("input", "weight", equation.conv2d),),
    "bias",
    {"stride": (1, (1, 1), [1, 1]), "padding": (0, (0, 0), [0, 0], "valid", "same"), "groups": (1,)},
)
_TENSORDOT = Form("tensordot", ("a", "b", "dims"), ())
_EINSUM = Form("einsum", ("equation", "operands", "second"), ())
_MM, _MV, _BMM = _two("mm", "input", "mat2"), _two("mv", "input", "vec"), _two("bmm", "input", "mat2")
_ADDMV = _two("addmv", "mat", "vec", "input", added="input")
_ADDMM = _two("addmm", "mat1", "mat2", "input", added="input")
_BADDBMM = _two("baddbmm", "batch1", "batch2", "input", added="input")
CONSUMERS: dict[Callable[..., Any] | str, Form] = {
    torch.nn.functional.linear: _LINEAR,
    operator.matmul: _MATMUL,
    "__matmul__": _MATMUL,
    torch.conv1d: _CONV1D,
    torch.conv2d: _CONV2D,
    torch.functional.tensordot: _TENSORDOT,
    torch.functional.einsum: _EINSUM,
    **{
        spelled: form
        for form in (_MATMUL, _MM, _MV, _BMM, _ADDMV, _ADDMM, _BADDBMM, _INNER)
        for spelled in (form.name, getattr(torch, form.name))
    },
}


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the graph whose weight is computed from constants.

    Attributes:
        node: the product itself.
        form: how it is spelled.
        x, weight: which of its arguments they are.
        x_first: axes of x of which there is only one index, unlike the weight's.
        equation: what it computes, less the axes that say nothing.
        matrices: the weight as matrices.
        refusal: why it cannot be served.
    """

    node: fx.Node
    form: Form
    x: str
    weight: str
    x_first: tuple[int, ...]
    equation: Equation
    matrices: Matrices
    refusal: str | None = None

    @property
    def x_node(self) -> fx.Node:
        """The node of the input."""
        found: fx.Node = arguments_of(self.node, self.form)[self.x]
        return found

    @property
    def weight_node(self) -> fx.Node:
        """The node of the weight."""
        found: fx.Node = arguments_of(self.node, self.form)[self.weight]
        return found


def find_products(graph: fx.Graph, constants: Constants) -> Iterator[Product]:
    """Walks the products with a constant weight."""
    for node in graph.nodes:
        form = CONSUMERS.get(node.target) if node.op in ("call_function", "call_method") else None
        if form is None or node in constants.nodes:
            continue
        operands = arguments_of(node, form)
        for x, weight, spelled in _ways(form, operands):
            held = operands.get(weight)
            if isinstance(held, fx.Node) and held in constants and example(held).ndim > 1:
                yield _product(node, form, x, weight, spelled)
                break


def operands_of(product: Product, node: fx.Node) -> dict[str, Any]:
    """What a product, or its copy ``node``, reads beside the weight, by the names of the arguments."""
    return {name: value for name, value in arguments_of(node, product.form).items() if name != product.weight}


def arguments_of(node: fx.Node, form: Form) -> dict[str, Any]:
    """The arguments of a product, or of its copy ``node``, by their names."""
    operands = dict(zip(form.arguments, node.args, strict=False))
    operands.update(node.kwargs)
    if form is _EINSUM:
        listed = operands.get("operands")
        factors = list(listed) if isinstance(listed, (list, tuple)) else list(node.args[1:])
        return {"equation": operands.get("equation"), **{str(i): factor for i, factor in enumerate(factors)}}
    return operands


def _ways(form: Form, operands: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[int, int], Equation | str]]]:
    yield from form.ways
    if form is _TENSORDOT:
        dims = operands.get("dims", 2)
        yield "a", "b", lambda x, weight: equation.tensordot(dims, x, weight, x_first=True)
        yield "b", "a", lambda x, weight: equation.tensordot(dims, x, weight, x_first=False)
    if form is _EINSUM and isinstance(operands["equation"], str) and operands.keys() == {"equation", "0", "1"}:
        spelled = operands["equation"]
        yield "0", "1", lambda x, weight: equation.einsum(spelled, x, weight, x_first=True)
        yield "1", "0", lambda x, weight: equation.einsum(spelled, x, weight, x_first=False)


def _product(node: fx.Node, form: Form, x: str, weight: str, spelled: Callable[[int, int], Equation | str]) -> Product:
    operands = arguments_of(node, form)
    value, held = example(operands[weight]), operands.get(x)
    plain = (
        Equation("k", "nk", "n"),
        Matrices((), tuple(range(value.ndim)), 1, value.shape[:-1].numel(), value.shape[-1]),
    )
    if not isinstance(held, fx.Node) or not isinstance(example(held), Tensor):
        return Product(node, form, x, weight, (), *plain, f"{form.name} with a literal as its input")
    axes = spelled(example(held).ndim, value.ndim)
    if isinstance(axes, str) or len(axes.weight) != value.ndim or len(axes.x) != example(held).ndim:
        why = axes if isinstance(axes, str) else f"{tuple(example(held).shape)} by {tuple(value.shape)}"
        return Product(node, form, x, weight, (), *plain, f"{form.name} of {why}")
    x_first = tuple(i for i in range(len(axes.x)) if _is_broadcast(example(held), i, axes, value))
    if any(axes.x[i] not in axes.out for i in x_first):
        why = f"{form.name} of an input that is broadcast along the columns"
        return Product(node, form, x, weight, (), *plain, why)
    kept = "".join(label for i, label in enumerate(axes.x) if i not in x_first)
    axes, seen = matrices(Equation(kept, axes.weight, axes.out), value)
    product = Product(node, form, x, weight, x_first, axes, seen)
    return dataclasses.replace(product, refusal=_refusal(product, operands))


def _is_broadcast(x: Tensor, axis: int, axes: Equation, weight: Tensor) -> bool:
    size, label = x.shape[axis], axes.x[axis]
    if isinstance(size, torch.SymInt) or size != 1 or label not in axes.weight:
        return False
    return weight.shape[axes.weight.index(label)] != 1


def is_bias(product: Product, operands: dict[str, Any]) -> bool:
    """Whether what is added is one value per row, which the op adds before its one rounding."""
    added = operands.get(product.form.added or "")
    if added is None or product.equation.batch or operands.get("alpha", 1) != 1 or operands.get("beta", 1) != 1:
        return False
    rows = product.equation.rows
    last = product.form in (_CONV1D, _CONV2D) or (len(rows) == 1 and product.equation.out.endswith(rows))
    return last and example(added).shape == (product.matrices.n,) and example(added).dtype in DTYPES


def _refusal(product: Product, operands: dict[str, Any]) -> str | None:
    form, x, weight = product.form, example(operands[product.x]), example(operands[product.weight])
    why = product.equation.refusal()
    if why is not None:
        return f"{form.name}: {why}"
    allowed = {*form.arguments, "alpha", "beta"} if form.added == "input" else set(form.arguments)
    if form is not _EINSUM and operands.keys() - allowed:
        return f"{form.name} with {', '.join(sorted(operands.keys() - allowed))}="
    for name, values in form.fixed.items():
        if name in operands and operands[name] not in values:
            return f"{form.name} with {name}={operands[name]}, expected {values[0]}"
    if x.dtype not in DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return f"{form.name} of {str(x.dtype).removeprefix('torch.')}: expected one of {expected}"
    if weight.requires_grad:
        return f"{form.name} with a weight that requires grad: FP4 weights get none"
    added = operands.get(form.added or "")
    if added is not None and not isinstance(added, fx.Node):
        return f"{form.name} with a literal in the place of what is added"
    if form.added == "bias" and added is not None and not is_bias(product, operands):
        return f"{form.name} with a bias that is not one value per row"
    return None
