"""Finds the products of a graph whose weight is computed from constants, and reads each as an equation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from marlin_w4a16.fake_impls.library import DTYPES
from marlin_w4a16.passes.find import equation
from marlin_w4a16.passes.find.equation import Equation, Matrices, matrices
from marlin_w4a16.passes.find.routes import Route, gathered, gathered_matrices, grouped_matrices
from marlin_w4a16.passes.find.spellings import CONSUMERS, CONV1D, CONV2D, EINSUM, GROUPED, TENSORDOT, Spelling
from marlin_w4a16.passes.graph.constants import Constants
from marlin_w4a16.passes.graph.names import dtype_name
from marlin_w4a16.passes.graph.nodes import example, is_reshaped
from marlin_w4a16.passes.graph.state import autocast_dtype
from marlin_w4a16.passes.graph.torch_private import forward_levels, is_plain, level_step, transform_of

_Spelled = Callable[[int, int], Equation | str]  # the equation of operands of so many dimensions, or why there is none


@dataclass(frozen=True, slots=True)
class Product:
    """A product of the graph whose weight is computed from constants.

    Attributes:
        node: the product itself.
        spelling: how it is spelled.
        x, weight: which of its arguments they are.
        x_first: axes of x of which there is only one index, unlike the weight's.
        equation: what it computes, less the axes that say nothing.
        matrices: the weight as matrices.
        refusal: why it cannot be served.
        route: how rows of x find their matrix of a stack, where the equation does not say so.
    """

    node: fx.Node
    spelling: Spelling
    x: str
    weight: str
    x_first: tuple[int, ...]
    equation: Equation
    matrices: Matrices
    refusal: str | None = None
    route: Route | None = None

    @property
    def routed(self) -> bool:
        """Whether its weight is a stack of matrices, each for some of the rows of x."""
        return self.route is not None or self.matrices.batch > 1

    @property
    def x_node(self) -> fx.Node:
        """The node of the input."""
        found: fx.Node = named_arguments(self.node, self.spelling)[self.x]
        return found

    @property
    def weight_node(self) -> fx.Node:
        """The node of the weight."""
        if self.route is not None:
            return self.route.stack
        found: fx.Node = named_arguments(self.node, self.spelling)[self.weight]
        return found


def find_products(graph: fx.Graph, constants: Constants) -> Iterator[Product]:
    """Walks the products with a constant weight."""
    levels = forward_levels()
    for node in graph.nodes:
        levels += level_step(node)
        spelling = _spelling_of(node)
        if spelling is None or node in constants.nodes:
            continue
        operands = named_arguments(node, spelling)
        for x, weight, spelled in _ways(spelling, operands):
            held = operands.get(weight)
            if not isinstance(held, fx.Node):
                continue
            route = gathered(held, constants)
            if route is None and (held not in constants or example(held).ndim < 2):
                continue
            plain = _plain(example(held if route is None else route.stack))
            why = "inside a level of forward-mode differentiation" if levels else None
            if any(map(is_reshaped, (node, *node.all_input_nodes))):
                why = f"{spelling.name} of what gets another shape in place"
            product = Product(node, spelling, x, weight, (), *plain, why, route)
            read = _gathered if route is not None else _grouped if spelling is GROUPED else _single
            product = product if why else read(product, operands, spelled)
            yield product if product.refusal else replace(product, refusal=_refusal(product, operands))
            break


def _spelling_of(node: fx.Node) -> Spelling | None:
    if node.op not in ("call_function", "call_method"):
        return None
    return CONSUMERS.get(node.target) or CONSUMERS.get(str(node.target).removesuffix(".default"))


def operands_of(product: Product, node: fx.Node) -> dict[str, Any]:
    """What a product, or its copy ``node``, reads beside the weight, by the names of the arguments."""
    return {name: value for name, value in named_arguments(node, product.spelling).items() if name != product.weight}


def named_arguments(node: fx.Node, spelling: Spelling) -> dict[str, Any]:
    """The arguments of a product, or of its copy ``node``, by their names."""
    operands = dict(zip(spelling.arguments, node.args, strict=False))
    operands |= {f"argument {i + 1}": node.args[i] for i in range(len(spelling.arguments), len(node.args))}
    operands.update(node.kwargs)
    if spelling is EINSUM:
        listed = operands.get("operands")
        factors = list(listed) if isinstance(listed, (list, tuple)) else list(node.args[1:])
        return {"equation": operands.get("equation"), **{str(i): factor for i, factor in enumerate(factors)}}
    return operands


def _ways(spelling: Spelling, operands: dict[str, Any]) -> Iterator[tuple[str, str, _Spelled]]:
    yield from spelling.ways
    if spelling is TENSORDOT:
        dims = operands.get("dims", 2)
        if any(isinstance(dim, fx.Node) for dim in tree_leaves(dims)):
            return
        yield "a", "b", lambda x, weight: equation.tensordot(dims, x, weight, x_first=True)
        yield "b", "a", lambda x, weight: equation.tensordot(dims, x, weight, x_first=False)
    if spelling is EINSUM and isinstance(operands["equation"], str) and operands.keys() == {"equation", "0", "1"}:
        spelled = operands["equation"]
        yield "0", "1", lambda x, weight: equation.einsum(spelled, x, weight, x_first=True)
        yield "1", "0", lambda x, weight: equation.einsum(spelled, x, weight, x_first=False)


def _single(product: Product, operands: dict[str, Any], spelled: _Spelled) -> Product:
    """Reads a product with a weight that stands there."""
    name, value, held = product.spelling.name, example(operands[product.weight]), example(operands.get(product.x))
    if not isinstance(held, Tensor):
        return replace(product, refusal=f"{name} with a literal as its input")
    axes = _axes(spelled, held, value)
    if isinstance(axes, str):
        return replace(product, refusal=f"{name} of {axes}")
    x_first = tuple(i for i in range(len(axes.x)) if _is_broadcast(held, i, axes, value))
    if any(axes.x[i] not in axes.out for i in x_first):
        return replace(product, refusal=f"{name} of an input that is broadcast along the columns")
    kept = "".join(label for i, label in enumerate(axes.x) if i not in x_first)
    axes, seen = matrices(Equation(kept, axes.weight, axes.out), value)
    return replace(product, x_first=x_first, equation=axes, matrices=seen)


def _grouped(product: Product, operands: dict[str, Any], _: _Spelled) -> Product:
    offsets, stack, held = operands.get("offs"), operands[product.weight], operands.get(product.x)
    shapes = [tuple(example(n).shape) if isinstance(n, fx.Node) else () for n in (held, stack)]
    if not isinstance(offsets, fx.Node) or [len(shape) for shape in shapes] != [2, 3]:
        return replace(product, refusal=f"{product.spelling.name} of {shapes[0]} by {shapes[1]}")
    axes, seen = grouped_matrices(example(stack))
    return replace(product, equation=axes, matrices=seen, route=Route("offsets", offsets, stack, product.node))


def _gathered(product: Product, operands: dict[str, Any], spelled: _Spelled) -> Product:
    route, value, held = cast(Route, product.route), example(operands[product.weight]), example(operands.get(product.x))
    is_input = isinstance(held, Tensor) and held.ndim
    axes = _axes(spelled, held, value) if is_input else f"{tuple(value.shape)} by a literal"
    seen = axes if isinstance(axes, str) else gathered_matrices(axes, example(route.node), example(route.stack))
    if isinstance(axes, str) or isinstance(seen, str):
        return replace(product, refusal=f"{product.spelling.name} of {seen}")
    return replace(product, equation=axes, matrices=seen)


def _axes(spelled: _Spelled, x: Tensor, weight: Tensor) -> Equation | str:
    """What operands of these shapes are asked for, or why it is not read."""
    axes = spelled(x.ndim, weight.ndim)
    if isinstance(axes, str) or (len(axes.x), len(axes.weight)) == (x.ndim, weight.ndim):
        return axes
    return f"{tuple(x.shape)} by {tuple(weight.shape)}"


def _plain(weight: Tensor) -> tuple[Equation, Matrices]:
    """Of a weight whose product is not understood."""
    n, k = weight.shape[:-1].numel(), weight.shape[-1]
    return Equation("k", "nk", "n"), Matrices((), tuple(range(weight.ndim)), 1, n, k)


def _is_broadcast(x: Tensor, axis: int, axes: Equation, weight: Tensor) -> bool:
    size, label = x.shape[axis], axes.x[axis]
    if isinstance(size, torch.SymInt) or size != 1 or label not in axes.weight:
        return False
    return weight.shape[axes.weight.index(label)] != 1


def is_bias(product: Product, operands: dict[str, Any]) -> bool:
    """Whether what is added is one value per row, which the op adds before its one rounding."""
    added = operands.get(product.spelling.added or "")
    if added is None or product.equation.batch or operands.get("alpha", 1) != 1 or operands.get("beta", 1) != 1:
        return False
    rows = product.equation.rows
    last = product.spelling in (CONV1D, CONV2D) or (len(rows) == 1 and product.equation.out.endswith(rows))
    return last and example(added).shape == (product.matrices.n,) and example(added).dtype in DTYPES


def _refusal(product: Product, operands: dict[str, Any]) -> str | None:
    spelling, x, weight = product.spelling, example(operands[product.x]), example(operands[product.weight])
    for value in map(example, (product.node, *operands.values())):
        if (transform := transform_of(value)) is not None:
            return f"inside torch.func's {transform}"
    if product.route is not None and product.matrices.batch == 1:
        return f"{spelling.name} of a stack of one matrix"
    if not is_plain(x):
        return f"{spelling.name} of a {type(x).__name__} of layout {x.layout}"
    why = None if spelling is GROUPED else product.equation.refusal()
    if why is not None:
        return f"{spelling.name}: {why}"
    allowed = {*spelling.arguments, "alpha", "beta"} if spelling.added == "input" else set(spelling.arguments)
    if spelling is not EINSUM and operands.keys() - allowed:
        return f"{spelling.name} with {', '.join(sorted(operands.keys() - allowed))}="
    for name, values in spelling.fixed.items():
        if name in operands and operands[name] not in values:
            return f"{spelling.name} with {name}={operands[name]}, expected {values[0]}"
    if isinstance(operands.get("beta"), fx.Node) or any(isinstance(operands.get(n), bool) for n in ("alpha", "beta")):
        return f"{spelling.name} with a factor that is no plain number"
    if x.dtype not in DTYPES:
        return f"{spelling.name} of {dtype_name(x.dtype)}: expected one of {', '.join(map(dtype_name, DTYPES))}"
    lowered, found = autocast_dtype(product.node, x.device.type), example(product.node).dtype
    if lowered not in (None, found):  # on a CPU, mv and addmv are not in its list; the op would be lowered
        told = f"found {dtype_name(found)}, expected {dtype_name(lowered)}"
        return f"{spelling.name} under autocast, of which it takes no notice: {told}"
    if weight.requires_grad:
        return f"{spelling.name} with a weight that requires grad: FP4 weights get none"
    added = operands.get(spelling.added or "")
    if added is not None and not isinstance(added, fx.Node):
        return f"{spelling.name} with a literal in the place of what is added"
    if added is None or is_bias(product, operands):
        return None
    if spelling.added == "bias":
        return f"{spelling.name} with a bias that is not one value per row"
    if example(product.node).dtype == torch.float16:  # the op rounds before, and what it rounds to may be infinite
        return f"{spelling.name} in float16 with more than a bias: the sum may be in range where the product is not"
    return None


def compute_dtype(products: Sequence[Product]) -> torch.dtype:
    """What products of one weight are computed in (under autocast not the dtype of their operands), narrowest first."""
    dtypes = {example(product.node).dtype for product in products}
    return next(dtype for dtype in DTYPES if dtype in dtypes)
