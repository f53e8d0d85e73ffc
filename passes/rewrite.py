"""The pass: from a traced graph and its live inputs to a graph of FP4 ops, the bindings that feed it, and a report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.kernels.layout import PackedFP4, packed_nbytes
from marlin_w4a16.passes import linear, tensors
from marlin_w4a16.passes.activations import quantised
from marlin_w4a16.passes.binding import Binding, fit, raised
from marlin_w4a16.passes.constants import Constants, example, find_constants, needed_by
from marlin_w4a16.passes.decode import Decode
from marlin_w4a16.passes.forms import Form
from marlin_w4a16.passes.outcome import Excluded, Owned, Rejected, Replaced, Row
from marlin_w4a16.passes.products import Product, find_products, operands_of
from marlin_w4a16.passes.recipe import FromSources, Recipe
from marlin_w4a16.passes.recognise import Found, may_be_fp4, recognise, verify
from marlin_w4a16.passes.regions import Flat, Regions
from marlin_w4a16.passes.settings import Settings
from marlin_w4a16.passes.sources import module_path, producer_of
from marlin_w4a16.passes.torch_private import add_static_input, inner_tensors, is_fake, part_names, source_name
from marlin_w4a16.passes.trial import worst_error

DEFAULTS = Settings()


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
        graph: the rewritten graph; it takes the inputs ``kept`` of the traced one, then three of each packed matrix.
        inputs: example inputs of it: the live ones that are kept, and fake ones for packed tensors.
        kept: positions of the traced inputs that are still used.
        bound: the weights to look up at each call.
        rows: the report.
        wrappers: positions of leaves that are wrapper subclasses, and the names of the tensors that hold their data.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    kept: tuple[int, ...]
    bound: tuple[Bound, ...]
    rows: tuple[Row, ...]
    wrappers: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Weight:
    """A weight of the graph while it is judged: what computes it, from what, and the products that use it."""

    path: str
    codes: int
    decode: Decode
    values: list[Any]
    refusal: str | None
    products: list[Product] = field(default_factory=list)
    quantised: dict[fx.Node, fx.Node] = field(default_factory=dict)  # by product, what its input was before (W4A4)


class _Judge:
    """Judges the weights of a graph; what computes several of them is searched once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[Any, tuple[Recipe, Form]] = {}
        self._shared: dict[fx.Node, Tensor] = {}

    def __call__(self, weight: _Weight) -> Found | Rejected | Excluded:
        excluded = self._settings.excluded(weight.path)
        if excluded is not None:
            return excluded
        if weight.refusal is not None:
            return Rejected(weight.refusal)
        if any(is_fake(part) for value in weight.values for part in inner_tensors(value)):
            return Rejected("the weights hold no values while this graph is compiled")
        served = linear.serves(example(weight.decode.value).device)
        if isinstance(served, Rejected):
            return served
        if weight.decode.base not in self._shared:
            self._shared.clear()
        weight.decode.shared = self._shared
        try:
            return self._found(weight)
        except Exception as error:
            return raised(error)
        finally:
            weight.decode.shared = None

    def _found(self, weight: _Weight) -> Found | Rejected:
        rules, decode = self._settings.rules, weight.decode
        known = self._known.get(decode.signature)
        if known is not None:
            found = verify(*known, decode, weight.values, weight.path, rules)
            if isinstance(found, Found):
                return found
        found = recognise(decode, weight.values, weight.path, rules)
        if isinstance(found, Found):
            self._known[decode.signature] = found.recipe, found.form
        return found


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings = DEFAULTS) -> Rewritten:
    """Replaces what it can prove; the traced graph itself is left as it was.

    Args:
        gm: a graph from Dynamo.
        inputs: its live example inputs.
        settings: what the user chose.
    """
    regions = Regions(gm)
    flat = regions.flatten()
    graph = regions.gm.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    constants = find_constants(flat.graph)
    judge = _Judge(settings)
    rows = list(_owned(flat.graph))
    bound: list[Bound] = []
    added: list[tuple[fx.Node, Any]] = []
    replaced: dict[fx.Node, Product] = {}
    for weight in _weights(flat, regions, constants, inputs, settings):
        found = judge(weight)
        packed: list[PackedFP4] | Rejected | None = None
        error = None
        if isinstance(found, Found):
            dtype = linear.compute_dtype(weight.products)
            binding = Binding(weight.decode, found, settings.rules, dtype, weight.path)
            packed = binding.adopt(weight.values, found.weight)
            if isinstance(packed, list):
                leaves = tuple(_position(flat, leaf, placeholders) for leaf in weight.decode.leaves)
                bound.append(Bound(binding, leaves, leaves[weight.codes]))
                after = added[-1][0] if added else placeholders[-1]
                new = list(_inputs(graph, placeholders[leaves[weight.codes]], after, packed, len(bound)))
                added += new
                error = _replace(weight, flat, regions, packed, [node for node, _ in new], settings)
                replaced.update((product.node, product) for product in weight.products)
        rows.append(_row(weight, found, packed, error))
        del found
    dead = _dead(flat, constants, replaced)
    leaves_of_all = {flat.origin[leaf] for leaf in constants.leaves}
    result = regions.finish(dead)
    kept = tuple(i for i, n in enumerate(placeholders) if n.users or n not in leaves_of_all)
    for i in set(range(len(placeholders))) - set(kept):
        graph.erase_node(placeholders[i])
    result.graph.lint()
    result.recompile()
    wrappers = {i: names for each in bound for i in each.leaves if (names := part_names(inputs[i]))}
    examples = [inputs[i] for i in kept] + [fake for _, fake in added]
    return Rewritten(result, examples, kept, tuple(bound), tuple(rows), wrappers)


def survey(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings = DEFAULTS) -> tuple[Row, ...]:
    """The report of `rewrite` without packing or changing anything."""
    regions = Regions(gm)
    flat = regions.flatten()
    weights = _weights(flat, regions, find_constants(flat.graph), inputs, settings)
    judge = _Judge(settings)
    return (*_owned(flat.graph), *(_row(weight, *_dry(weight, judge(weight)), None) for weight in weights))


def _dry(weight: _Weight, found: Found | Rejected | Excluded) -> tuple[Found | Rejected | Excluded, Rejected | None]:
    """What was found, and why it would not be packed."""
    if not isinstance(found, Found):
        return found, None
    fitted = fit(found.weight, linear.compute_dtype(weight.products))
    return found, fitted if isinstance(fitted, Rejected) else None


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


def _weights(
    flat: Flat, regions: Regions, constants: Constants, inputs: Sequence[Any], settings: Settings
) -> Iterator[_Weight]:
    """The weights that could be FP4, each once however often its computation was traced."""
    live = dict(zip(flat.graph.find_nodes(op="placeholder"), inputs, strict=True))
    found: dict[Any, _Weight] = {}
    for product in find_products(flat.graph, constants):
        decode = Decode.of(product.weight_node, product.node, product.matrices, constants)
        if not decode.leaves or not may_be_fp4(decode, settings.rules):
            continue
        source, refusal = None, product.refusal
        if settings.activation_quant != "keep" and refusal is None:
            source = quantised(product.x_node, constants, live)
            if source is not None and not regions.sees(flat.origin[source], flat.origin[product.node].graph):
                source = None  # inside a region that ends before the product
            if source is not None and settings.activation_quant == "refuse":
                refusal = "its input is quantised too (W4A4), which options={'activation_quant': 'refuse'} leaves alone"
        key = (tuple(decode.leaves), decode.signature, refusal)
        if key not in found:
            codes = _codes(decode)
            path = module_path(source_name(decode.leaves[codes]))
            found[key] = _Weight(path, codes, decode, [live[n] for n in decode.leaves], refusal)
        found[key].products.append(product)
        if source is not None:
            found[key].quantised[product.node] = source
    return iter(found.values())


def _codes(decode: Decode) -> int:
    """The leaf that the report names: the one that is likely to hold codes."""
    sizes = [example(leaf).numel() if example(leaf).element_size() == 1 else 0 for leaf in decode.leaves]
    typed = [tensors.is_typed(example(leaf)) for leaf in decode.leaves]
    return typed.index(True) if any(typed) else sizes.index(max(sizes))


def _position(flat: Flat, leaf: fx.Node, placeholders: list[fx.Node]) -> int:
    return placeholders.index(flat.origin[leaf])


def _inputs(
    graph: fx.Graph, like: fx.Node, after: fx.Node, packed: list[PackedFP4], number: int
) -> Iterator[tuple[fx.Node, Tensor]]:
    for index, matrix in enumerate(packed):
        for member in ("words", "scales", "multiplier"):
            name = f"{member}_{number}" if len(packed) == 1 else f"{member}_{number}_{index}"
            with graph.inserting_after(after):
                after, fake = add_static_input(graph, like, name, getattr(matrix, member))
            yield after, fake


def _replace(
    weight: _Weight, flat: Flat, regions: Regions, packed: list[PackedFP4], inputs: list[fx.Node], settings: Settings
) -> float | None:
    """Replaces the products of a weight; with ``verify``, says how far they are from their traced forms."""
    errors = []
    for product in weight.products:
        node = flat.origin[product.node]
        inner = [regions.reach(n, node.graph) for n in inputs]
        operands = operands_of(product, node)
        if product.node in weight.quantised:
            operands[product.x] = regions.reach(flat.origin[weight.quantised[product.node]], node.graph)
        written = linear.replace(product, node, packed, inner, operands[product.x])
        if settings.verify:
            errors.append(worst_error(weight.decode, weight.values, product, operands, written, inner, packed))
    return max(errors, default=None)


def _dead(flat: Flat, constants: Constants, replaced: dict[fx.Node, Product]) -> set[fx.Node]:
    roots: list[fx.Node] = []
    for node in flat.graph.nodes:
        if node in replaced:
            operands = operands_of(replaced[node], node).values()
            roots += [n for n in operands if isinstance(n, fx.Node) and n in constants.nodes]
        elif node not in constants.nodes:
            roots += [n for n in node.all_input_nodes if n in constants.nodes]
    live = needed_by(roots, constants)
    return {flat.origin[node] for node in constants.nodes if node not in live}


def _row(
    weight: _Weight,
    found: Found | Rejected | Excluded,
    packed: list[PackedFP4] | Rejected | None,
    error: float | None,
) -> Row:
    product, path = weight.products[0], weight.path
    outcome: Replaced | Rejected | Excluded
    if isinstance(packed, Rejected):
        outcome = packed
    elif isinstance(found, Found):
        seen = weight.decode.matrices
        nbytes = seen.batch * packed_nbytes(seen.n, seen.k, found.recipe.group)
        served = linear.serves(example(weight.decode.value).device)
        dropped = "the quantisation of its input is left out" if weight.quantised else None
        note = "; ".join(filter(None, (found.note, dropped))) or None
        outcome = Replaced("marlin_w4a16::linear", str(served), nbytes, note, error, found.detail)
        if isinstance(found.recipe, FromSources) and found.recipe.window.total > weight.decode.rows:
            rows = found.recipe.window.rows(weight.decode.rows)
            path = f"{path}[{rows.start}:{rows.stop}{f':{rows.step}' if rows.step > 1 else ''}]"
    else:
        outcome = found
    return Row(
        path=path,
        spelling=product.form.name,
        shape=(weight.decode.rows, weight.decode.matrices.k),
        format=found.format if isinstance(found, Found) else None,
        outcome=outcome,
        nbytes=sum(t.numel() * t.element_size() for value in weight.values for t in inner_tensors(value)),
        uses=len(weight.products),
        producer=next(filter(None, map(producer_of, weight.values)), None),
    )
