"""Finds products with constant FP4 weights and replaces them by ``marlin_w4a16::linear``."""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.fake_impls.library import DTYPES, format_args
from marlin_w4a16.fake_impls.linear import uses_triton
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.constants import Constants, example
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.torch_private import fake_result


@dataclass(frozen=True, slots=True)
class Form:
    """How a traced function spells a product of x and a weight.

    Attributes:
        name: for reports.
        arguments: the names of x, weight and bias, in their positions.
        transposed: the weight stands as ``[k, n]``.
        x_dims: the numbers of dimensions x may have.
    """

    name: str
    arguments: tuple[str, ...]
    transposed: bool
    x_dims: range = range(1, 64)


_MATMUL = Form("matmul", ("input", "other"), True)
_MM = Form("mm", ("input", "mat2"), True, range(2, 3))
CONSUMERS: dict[Callable[..., Any] | str, Form] = {
    torch.nn.functional.linear: Form("F.linear", ("input", "weight", "bias"), False),
    torch.matmul: _MATMUL,
    operator.matmul: _MATMUL,
    "matmul": _MATMUL,
    "__matmul__": _MATMUL,
    torch.mm: _MM,
    "mm": _MM,
}


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the graph whose weight is computed from constants.

    Attributes:
        node: the product itself.
        form: how it is spelled.
        weight: the node of its weight.
    """

    node: fx.Node
    form: Form
    weight: fx.Node

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        rows, columns = example(self.weight).shape
        return (columns, rows) if self.form.transposed else (rows, columns)


def find_products(graph: fx.Graph, constants: Constants) -> Iterator[tuple[Product, Rejected | None]]:
    """Walks the products with a two-dimensional constant weight; one that cannot be served comes with its reason."""
    for node in graph.nodes:
        form = CONSUMERS.get(node.target) if node.op in ("call_function", "call_method") else None
        if form is None:
            continue
        operands = _operands(node, form)
        weight = operands.get(form.arguments[1])
        if not isinstance(weight, fx.Node) or weight not in constants.nodes or not _is_matrix(example(weight)):
            continue
        reason = _refusal(operands, form)
        yield Product(node, form, weight), Rejected(reason) if reason else None


def find_packed(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The calls of ``marlin_w4a16::linear`` that were traced as such, by the node of their packed words."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target in (torch.ops.marlin_w4a16.linear, torch.ops.marlin_w4a16.linear.default):
            found.setdefault(node.args[1], []).append(node)
    return found


def serves(device: torch.device) -> Rejected | str:
    """The kernel that runs linears of a device, or why they are left alone there."""
    if device.type == "cpu":
        return "CPU blocks"
    if device.type != "cuda":
        return Rejected(f"device {device.type}: expected cuda or cpu")
    if uses_triton(device):
        return "Triton"
    major, minor = torch.cuda.get_device_capability(device)
    why = "it has FP4 tensor cores of its own" if major >= 10 else "the kernels need 8.0"
    return Rejected(f"device of capability {major}.{minor} is left alone: {why}")


def compute_dtype(products: Sequence[Product]) -> torch.dtype:
    """What products of one weight are computed in (under autocast not the dtype of their operands), narrowest first."""
    dtypes = {example(product.node).dtype for product in products}
    return next(dtype for dtype in DTYPES if dtype in dtypes)


def replace(product: Product, node: fx.Node, packed: PackedFP4, inputs: Sequence[fx.Node]) -> None:
    """Puts the op in the place of ``node``, the product's copy in the graph that is rewritten.

    ``inputs`` are the placeholders of words, scales and multiplier.
    """
    operands = _operands(node, product.form)
    with node.graph.inserting_before(node):
        args = (operands[product.form.arguments[0]], *inputs, *format_args(packed), operands.get("bias"))
        new = node.graph.call_function(torch.ops.marlin_w4a16.linear.default, args)
    new.meta.update(node.meta)
    new.meta["example_value"] = fake_result(new).to(example(node).dtype)  # which autocast may have chosen
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _operands(node: fx.Node, form: Form) -> dict[str, Any]:
    operands = dict(zip(form.arguments, node.args, strict=False))
    operands.update(node.kwargs)
    return operands


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _refusal(operands: dict[str, Any], form: Form) -> str | None:
    x, bias = operands.get(form.arguments[0]), operands.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(example(x), Tensor):
        return f"{form.name} with a literal as its input"
    if operands.keys() - set(form.arguments):
        return f"{form.name} with {', '.join(sorted(operands.keys() - set(form.arguments)))}="
    if example(x).ndim not in form.x_dims:
        return f"{form.name} of an input of {example(x).ndim} dimensions"
    if example(x).dtype not in DTYPES:
        return f"{form.name} of an input of {example(x).dtype}: expected one of {DTYPES}"
    if example(operands[form.arguments[1]]).requires_grad:
        return f"{form.name} with a weight that requires grad: FP4 weights get none"
    if bias is not None and (not isinstance(bias, fx.Node) or example(bias).ndim != 1):
        return f"{form.name} with a bias that is not one value per row"
    return None
