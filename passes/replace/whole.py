"""What is replaced, or left, as one: a weight by itself, or whole mixtures of experts that were proved."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import fx

from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import Product, operands_of
from marlin_w4a16.passes.judge.verdict import Found, Verdict
from marlin_w4a16.passes.judge.weights import Weight
from marlin_w4a16.passes.live.binding import Copies
from marlin_w4a16.passes.mixture.trial import Proved
from marlin_w4a16.passes.outcome import Rejected, Row
from marlin_w4a16.passes.replace import linear, moe
from marlin_w4a16.passes.replace.edit import Edit
from marlin_w4a16.passes.replace.report_rows import row_of
from marlin_w4a16.passes.replace.verify import mixture_error, worst_error


@dataclass(frozen=True, slots=True)
class Alone:
    """A weight by itself.

    Attributes:
        outcome: what it was found to be, or why it is left.
        no_mixture: why it is part of no whole mixture, if it looked like one.
    """

    weight: Weight
    outcome: Verdict
    no_mixture: Rejected | None = None

    @property
    def rounds(self) -> bool:
        """Whether it is part of no mixture because the model rounds on the way."""
        return self.no_mixture is not None and self.no_mixture.rounds

    def rows(self, error: float | None = None) -> Iterator[Row]:
        """The row of the report."""
        yield row_of(self.weight, self.outcome, self.no_mixture, error)

    def replace(self, edit: Edit, copies: Copies, verify: bool) -> Iterator[Row]:
        """Replaces the products of the weight, if it is FP4; with ``verify``, also runs each beside its traced form."""
        errors = []
        if isinstance(self.outcome, Found):
            binding, packed = copies.bound(self.weight, self.outcome, None)
            inputs = edit.feed(self.weight, binding, packed)
            errors = [self._product(edit, product, packed, inputs, verify) for product in self.weight.products]
            routes = [product.route for product in self.weight.products if product.route is not None]
            edit.replaced((route.reader for route in routes if edit.replaced_all(route.reader.users)), ())
        yield from self.rows(max(errors, default=None) if verify else None)

    def _product(self, edit: Edit, product: Product, packed: PackedFP4, inputs: list[fx.Node], verify: bool) -> float:
        """Replaces one product; with ``verify``, says how far it is from its traced form."""
        node = edit.here(product.node)
        inner = [edit.traced.regions.reach(n, node.graph) for n in inputs]
        operands = operands_of(product, node)
        if product.node in self.weight.quantised:
            operands[product.x] = edit.reach(self.weight.quantised[product.node], node.graph)
        routing = None
        if product.route is not None:
            routing = operands["routing"] = edit.reach(product.route.node, node.graph)
        written = linear.replace(product, node, packed, inner, operands[product.x], routing)
        read = (n for n in operands_of(product, product.node).values() if isinstance(n, fx.Node))
        edit.replaced([product.node], read)
        if not verify:
            return 0.0
        return worst_error(self.weight, product, operands, written, inner, packed)


@dataclass(frozen=True, slots=True)
class WholeMixture:
    """Mixtures of experts that share their two weights.

    Attributes:
        weights, found: those of the first and the second product, and what they are.
        proved: the mixtures, all with the same order of gates.
    """

    weights: tuple[Weight, Weight]
    found: tuple[Found, Found]
    proved: list[Proved]

    def rows(self, error: float | None = None) -> Iterator[Row]:
        """The rows of the report."""
        for weight, found in zip(self.weights, self.found, strict=True):
            yield row_of(weight, found, self.proved[0], error)

    def replace(self, edit: Edit, copies: Copies, verify: bool) -> Iterator[Row]:
        """Replaces each mixture by one op; see `Alone.replace`."""
        packed, inputs = [], []
        for weight, found, order in zip(self.weights, self.found, (self.proved[0].order, None), strict=True):
            binding, copy = copies.bound(weight, found, order)
            packed.append(copy)
            inputs.append(edit.feed(weight, binding, copy))
        errors = []
        for proved in self.proved:
            m, graph = proved.mixture, edit.here(proved.mixture.output).graph
            inner = [[edit.traced.regions.reach(n, graph) for n in nodes] for nodes in inputs]
            moe.replace(proved, partial(edit.reach, graph=graph), packed, inner)
            read = [n for n in (*m.given, m.bias13, m.bias2, m.scores if proved.read_scores else None) if n is not None]
            edit.replaced(edit.traced.flow.idle(m.nodes, m.outputs, read), read)
            if verify:
                errors.append(mixture_error(proved, self.weights, packed, edit.traced))
        yield from self.rows(max(errors, default=None))
