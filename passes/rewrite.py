"""The pass: from a traced graph and its live inputs to a graph of FP4 ops, the bindings that feed it, and a report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes import linear
from marlin_w4a16.passes.binding import Binding, computed
from marlin_w4a16.passes.constants import Constants, evaluate, example, find_constants, needed_by, signature, slice_of
from marlin_w4a16.passes.outcome import Owned, Rejected, Replaced, Row
from marlin_w4a16.passes.recognise import Recipe, may_be_fp4, recognise
from marlin_w4a16.passes.sources import module_path, producer_of
from marlin_w4a16.passes.torch_private import add_static_input, graph_copy, is_fake, source_name


@dataclass(frozen=True, slots=True)
class Bound:
    """A binding and where its leaves, and among them its codes, stand among the inputs of the traced graph."""

    binding: Binding
    leaves: tuple[int, ...]
    codes: int


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What the pass made of a graph.

    Attributes:
        graph: the rewritten graph; it takes the inputs ``kept`` of the traced one, then three of each binding.
        inputs: example inputs of it: the live ones that are kept, and fake ones for packed tensors.
        kept: positions of the traced inputs that are still used.
        bound: the weights to look up at each call.
        rows: the report.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    kept: tuple[int, ...]
    bound: tuple[Bound, ...]
    rows: tuple[Row, ...]


@dataclass(slots=True)
class _Weight:
    """A weight of the graph while it is judged: its node, the slice that computes it, the products that use it."""

    path: str
    node: fx.Node
    nodes: list[fx.Node]
    leaves: list[fx.Node]
    values: list[Any]
    products: list[linear.Product] = field(default_factory=list)
    refusal: Rejected | None = None

    def evaluator(self) -> Callable[[Sequence[Tensor]], Tensor]:
        """Computes the traced weight ``[n, k]`` from the values of its leaves."""
        node, nodes, leaves, transposed = self.node, self.nodes, self.leaves, self.products[0].form.transposed

        def evaluate_weight(values: Sequence[Tensor]) -> Tensor:
            value = evaluate(node, nodes, dict(zip(leaves, values, strict=True)))
            return value.t() if transposed else value

        return evaluate_weight


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any]) -> Rewritten:
    """Replaces what it can prove; the traced graph itself is left as it was.

    Args:
        gm: a graph from Dynamo.
        inputs: its live example inputs.
    """
    constants = find_constants(gm.graph)
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    copy, copies = graph_copy(gm)
    last_input = copies[placeholders[-1]] if placeholders else None
    rows = list(_owned(gm.graph))
    bound: list[Bound] = []
    added: list[Any] = []
    for weight in _weights(gm.graph, constants, dict(zip(placeholders, inputs, strict=True))):
        recipe = _judge(weight)
        packed: PackedFP4 | Rejected | None = None
        if isinstance(recipe, Recipe):
            binding = Binding(weight.evaluator(), recipe, linear.compute_dtype(weight.products), weight.path)
            packed = binding.adopt(weight.values)
            if isinstance(packed, PackedFP4):
                codes = copies[weight.leaves[recipe.codes]]
                nodes, fakes = _inputs(copy.graph, codes, last_input, packed, len(bound))
                leaves = tuple(placeholders.index(leaf) for leaf in weight.leaves)
                bound.append(Bound(binding, leaves, leaves[recipe.codes]))
                last_input, added = nodes[-1], added + fakes
                for product in weight.products:
                    linear.replace(product, copies[product.node], packed, nodes)
        rows.append(_row(weight, recipe, packed))
    _erase_dead(copy.graph, Constants(*(frozenset(copies[n] for n in s) for s in (constants.leaves, constants.nodes))))
    kept = tuple(i for i, n in enumerate(placeholders) if copies[n].users or n not in constants.leaves)
    for i in set(range(len(placeholders))) - set(kept):
        copy.graph.erase_node(copies[placeholders[i]])
    copy.graph.lint()
    copy.recompile()
    return Rewritten(copy, [inputs[i] for i in kept] + added, kept, tuple(bound), tuple(rows))


def survey(gm: fx.GraphModule, inputs: Sequence[Any]) -> tuple[Row, ...]:
    """The report of `rewrite` without packing or changing anything."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    live = dict(zip(placeholders, inputs, strict=True))
    weights = _weights(gm.graph, find_constants(gm.graph), live)
    return (*_owned(gm.graph), *(_row(weight, _judge(weight), None) for weight in weights))


def _owned(graph: fx.Graph) -> Iterator[Row]:
    for words, calls in linear.find_packed(graph).items():
        args: tuple[Any, ...] = calls[0].args
        _, _, scales, multiplier, n, k, group, kind, layout, *_ = args
        packed = PackedFP4(example(words), example(scales), example(multiplier), n, k, kind, group, layout)
        path = module_path(source_name(words)).removesuffix(".words")
        served = linear.serves(packed.words.device)
        kernel = "blocks" if isinstance(served, Rejected) else served  # the op runs everywhere
        outcome = Owned("marlin_w4a16::linear", kernel, packed.nbytes)
        yield Row(path, "packed", (n, k), packed.format, outcome, 0, len(calls))


def _weights(graph: fx.Graph, constants: Constants, live: dict[fx.Node, Any]) -> Iterator[_Weight]:
    """The weights that could be FP4, each once however often its computation was traced."""
    found: dict[tuple[Any, ...], _Weight] = {}
    for product, refusal in linear.find_products(graph, constants):
        nodes = slice_of(product.weight, product.node, constants)
        leaves = [n for n in nodes if n in constants.leaves]
        if not may_be_fp4(example(product.weight).shape, [example(n) for n in leaves]):
            continue
        key = (tuple(leaves), product.form.transposed, signature(product.weight, nodes), refusal)
        if key not in found:
            codes = next(n for n in leaves if may_be_fp4(example(product.weight).shape, [example(n)]))
            path = module_path(source_name(codes))
            found[key] = _Weight(path, product.weight, nodes, leaves, [live[n] for n in leaves], refusal=refusal)
        found[key].products.append(product)
    return iter(found.values())


def _judge(weight: _Weight) -> Recipe | Rejected:
    if weight.refusal is not None:
        return weight.refusal
    if any(is_fake(value) for value in weight.values):
        return Rejected("the weights hold no values while this graph is compiled")
    served = linear.serves(example(weight.node).device)
    if isinstance(served, Rejected):
        return served
    value = computed(weight.evaluator(), weight.values)
    return value if isinstance(value, Rejected) else recognise(value, weight.values, weight.path)


def _inputs(
    graph: fx.Graph, codes: fx.Node, after: fx.Node | None, packed: PackedFP4, number: int
) -> tuple[list[fx.Node], list[Tensor]]:
    nodes, fakes = [], []
    for member in ("words", "scales", "multiplier"):
        with graph.inserting_after(after):
            after, fake = add_static_input(graph, codes, f"{member}_{number}", getattr(packed, member))
        nodes.append(after)
        fakes.append(fake)
    return nodes, fakes


def _erase_dead(graph: fx.Graph, constants: Constants) -> None:
    live = needed_by([n for n in graph.nodes if n.op != "placeholder" and n not in constants.nodes], constants)
    for node in reversed(list(graph.nodes)):
        if node in constants.nodes and node not in live:
            graph.erase_node(node)


def _row(weight: _Weight, recipe: Recipe | Rejected, packed: PackedFP4 | Rejected | None) -> Row:
    first = weight.products[0]
    outcome = next((o for o in (recipe, packed) if isinstance(o, Rejected)), None)
    served = linear.serves(example(weight.node).device)
    return Row(
        path=weight.path,
        spelling=first.form.name,
        shape=first.shape,
        format=recipe.format if isinstance(recipe, Recipe) else None,
        outcome=outcome
        or Replaced("marlin_w4a16::linear", str(served), packed.nbytes if isinstance(packed, PackedFP4) else 0),
        nbytes=sum(t.numel() * t.element_size() for t in weight.values),
        uses=len(weight.products),
        producer=next(filter(None, map(producer_of, weight.values)), None),
    )
