"""The weights of a graph that may be FP4: what computes each, which products use it, and whether it is one."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.passes.devices import serves
from marlin_w4a16.passes.find.inputs import quantised
from marlin_w4a16.passes.find.products import Product, find_products
from marlin_w4a16.passes.graph.names import module_path
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.graph.torch_private import inner_tensors, is_fake, source_name
from marlin_w4a16.passes.graph.traced import Traced
from marlin_w4a16.passes.judge import tensors
from marlin_w4a16.passes.judge.decode import Decode
from marlin_w4a16.passes.judge.recipe import Recipe
from marlin_w4a16.passes.judge.roundings import Roundings
from marlin_w4a16.passes.judge.search import may_be_fp4, recognise
from marlin_w4a16.passes.judge.verdict import Found, Verdict, judge_again
from marlin_w4a16.passes.outcome import Excluded, Rejected, raised
from marlin_w4a16.passes.settings import Settings


@dataclass(slots=True, eq=False)
class Weight:
    """A weight of the graph while it is judged: what computes it, from what, and the products that use it."""

    path: str
    codes_leaf: int
    decode: Decode
    values: list[Any]
    refusal: str | None
    products: list[Product] = field(default_factory=list)
    quantised: dict[fx.Node, fx.Node] = field(default_factory=dict)  # by product, what its input was before (W4A4)

    @property
    def routed(self) -> bool:
        """Whether it is a stack."""
        return self.products[0].routed


class Judge:
    """Judges the weights of a graph; what computes several of them is searched once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._known: dict[Any, tuple[Recipe, Roundings]] = {}
        self._shared: dict[fx.Node, Tensor] = {}

    def __call__(self, weight: Weight) -> Verdict:
        if (excluded := self._settings.excluded(weight.path)) is not None:
            return excluded
        if not self._settings.linear and not weight.routed:
            return Excluded("options={'linear': False}")
        if weight.refusal is not None:
            return Rejected(weight.refusal)
        if any(is_fake(part) for value in weight.values for part in inner_tensors(value)):
            return Rejected("the weights hold no values while this graph is compiled")
        served = serves(example(weight.decode.value).device)
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

    def _found(self, weight: Weight) -> Found | Rejected:
        rules, decode = self._settings.rules, weight.decode
        known = self._known.get(decode.signature)
        if known is not None:
            found = judge_again(*known, decode, weight.values, weight.path, rules)
            if isinstance(found, Found):
                return found
        found = recognise(decode, weight.values, weight.path, rules)
        if isinstance(found, Found):
            self._known[decode.signature] = found.recipe, found.roundings
        return found


def find_weights(traced: Traced, settings: Settings) -> Iterator[Weight]:
    """The weights that could be FP4, each once however often its computation was traced."""
    constants, live = traced.constants, traced.live
    found: dict[Any, Weight] = {}
    for found_product in find_products(traced.flat.graph, constants):
        product = _as_read(found_product, traced)
        reader = product.route.reader if product.route else product.node
        decode = Decode.of(product.weight_node, reader, product.matrices, constants)
        if not decode.leaves or not may_be_fp4(decode, settings.rules):
            continue
        source, refusal = None, product.refusal
        if settings.activation_quant != "keep" and refusal is None:
            source = quantised(product.x_node, constants, live)
            if source is not None and not traced.sees(source, product.node):
                source = None  # inside a region that ends before the product
            if source is not None and settings.activation_quant == "refuse":
                refusal = "its input is quantised too (W4A4), which options={'activation_quant': 'refuse'} leaves alone"
        key = (tuple(decode.leaves), decode.signature, refusal)
        if key not in found:
            codes = _codes_leaf(decode)
            path = module_path(source_name(decode.leaves[codes]))
            found[key] = Weight(path, codes, decode, [live[n] for n in decode.leaves], refusal)
        found[key].products.append(product)
        if source is not None:
            found[key].quantised[product.node] = source
    return iter(found.values())


def _as_read(product: Product, traced: Traced) -> Product:
    """A product, refused if something writes to the matrices that it reads, or to their ids, once they are gathered."""
    route = product.route
    if product.refusal or route is None:
        return product
    if not traced.flow.is_written([route.reader, route.node], route.reader, product.node):
        return product
    why = f"{product.spelling.name} of matrices that are written to, or whose ids are, once they are gathered"
    return replace(product, refusal=why)


def _codes_leaf(decode: Decode) -> int:
    """The leaf that the report names: the one that is likely to hold codes."""
    sizes = [example(leaf).numel() if example(leaf).element_size() == 1 else 0 for leaf in decode.leaves]
    typed = [tensors.is_typed(example(leaf)) for leaf in decode.leaves]
    return typed.index(True) if any(typed) else sizes.index(max(sizes))
