"""The pass: from a traced graph and its live inputs to a graph of FP4 ops, the bindings that feed it, and a report."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import operands_of
from marlin_w4a16.passes.graph.constants import find_constants, needed_by
from marlin_w4a16.passes.graph.flow import Flow
from marlin_w4a16.passes.graph.regions import Regions
from marlin_w4a16.passes.graph.torch_private import add_static_input, part_names
from marlin_w4a16.passes.judge.search import Found
from marlin_w4a16.passes.judge.weights import Judge, Weight
from marlin_w4a16.passes.live.binding import Binding, fit
from marlin_w4a16.passes.live.call import Bound, Rewritten
from marlin_w4a16.passes.mixture.proof import Prover
from marlin_w4a16.passes.mixture.stacks import pack_stack
from marlin_w4a16.passes.mixture.trial import Proved
from marlin_w4a16.passes.mixture.units import Unit, find_units
from marlin_w4a16.passes.outcome import Excluded, Rejected, Row
from marlin_w4a16.passes.replace import linear, moe
from marlin_w4a16.passes.replace.report_rows import owned, row_of
from marlin_w4a16.passes.replace.verify import mixture_error, worst_error
from marlin_w4a16.passes.settings import Settings

DEFAULTS = Settings()


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings = DEFAULTS) -> Rewritten:
    """Replaces what it can prove; the traced graph itself is left as it was.

    Args:
        gm: a graph from Dynamo.
        inputs: its live example inputs.
        settings: what the user chose.
    """
    work = _Rewriter(gm, inputs, settings)
    rows = list(owned(work.flat.graph))
    for unit in work.units():
        rows += work.replace(unit)
    return work.finish(rows)


def survey(gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings = DEFAULTS) -> tuple[Row, ...]:
    """The report of `rewrite`, without changing anything; of mixtures that are alike, one is packed for its proof."""
    work = _Rewriter(gm, inputs, settings)
    return (*owned(work.flat.graph), *(row for unit in work.units() for row in work.survey(unit)))


_Outcome = Found | Rejected | Excluded
_Whole = list[Proved] | Rejected | None


class _Rewriter:
    """Rewrites one graph, unit by unit."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any], settings: Settings) -> None:
        self.settings, self.inputs = settings, inputs
        self.regions = Regions(gm)
        self.flat = self.regions.flatten()
        self.constants = find_constants(self.flat.graph)
        self.judge = Judge(settings)
        self.prover = Prover(self.constants)
        self.live = dict(zip(self.flat.graph.find_nodes(op="placeholder"), inputs, strict=True))
        self.placeholders = list(self.regions.gm.graph.find_nodes(op="placeholder"))
        self.bound: list[Bound] = []
        self.added: list[tuple[fx.Node, Any]] = []
        self.gone: set[fx.Node] = set()  # nodes of the flat graph that ops stand for
        self.used: list[fx.Node] = []  # what these ops read

    @functools.cached_property
    def flow(self) -> Flow:
        """What its nodes read and write."""
        return Flow(self.flat.graph, self.constants)

    def units(self) -> list[Unit]:
        """What is judged together."""
        return find_units(self.flat, self.regions, self.constants, self.inputs, self.settings, lambda: self.flow)

    def survey(self, unit: Unit) -> Iterator[Row]:
        """The rows of `replace`."""
        founds = [self._found(weight, unit) for weight in unit.weights]

        def packed(weight: Weight, found: Found, order: Order | None) -> PackedFP4:
            return pack_stack(found.weight, weight.decode.matrices.batch, order)

        whole = self._whole(unit, founds, packed)
        for weight, found in zip(unit.weights, founds, strict=True):
            yield row_of(weight, self._alone(weight, found, whole), _of(whole))

    def replace(self, unit: Unit) -> Iterator[Row]:
        """Packs the weights of a unit and replaces what uses them."""
        founds = [self._found(weight, unit) for weight in unit.weights]
        held: dict[tuple[Weight, Order | None], tuple[Binding, PackedFP4]] = {}

        def packed(weight: Weight, found: Found, order: Order | None) -> PackedFP4:
            if (weight, order) not in held:
                dtype = linear.compute_dtype(weight.products)
                binding = Binding(weight.decode, found, self.settings.rules, dtype, weight.path, order)
                copy = binding.adopt(weight.values, found.weight)
                assert isinstance(copy, PackedFP4)  # `_found` has fitted it
                held[weight, order] = binding, copy
            return held[weight, order][1]

        whole = self._whole(unit, founds, packed)
        outcomes = [self._alone(weight, found, whole) for weight, found in zip(unit.weights, founds, strict=True)]
        fed: list[tuple[PackedFP4, list[fx.Node]]] = []
        orders = (whole[0].order, None) if isinstance(whole, list) else (None,) * len(outcomes)
        for weight, found, order in zip(unit.weights, outcomes, orders, strict=True):
            if isinstance(found, Found):
                copy = packed(weight, found, order)
                fed.append((copy, self._feed(weight, held[weight, order][0], copy)))
            if not isinstance(whole, list):
                error = self._pieces(weight, *fed.pop()) if isinstance(found, Found) else None
                yield row_of(weight, found, _of(whole), error)
        if isinstance(whole, list):
            errors = [self._mixture(proved, unit.weights, fed) for proved in whole]
            error = max(errors) if self.settings.verify else None
            for weight, found in zip(unit.weights, outcomes, strict=True):
                yield row_of(weight, found, _of(whole), error)

    def finish(self, rows: list[Row]) -> Rewritten:
        """The rewritten graph, without what is no longer needed."""
        placeholders, graph = self.placeholders, self.regions.gm.graph
        dead = self._dead()
        leaves_of_all = {self.flat.origin[leaf] for leaf in self.constants.leaves}
        result = self.regions.finish(dead)
        kept = tuple(i for i, n in enumerate(placeholders) if n.users or n not in leaves_of_all)
        for i in set(range(len(placeholders))) - set(kept):
            graph.erase_node(placeholders[i])
        result.graph.lint()
        result.recompile()
        leaves = {i for each in self.bound for i in each.leaves}
        wrappers = {i: names for i in sorted(leaves) if (names := part_names(self.inputs[i]))}
        examples = [self.inputs[i] for i in kept] + [fake for _, fake in self.added]
        return Rewritten(result, examples, kept, tuple(self.bound), tuple(rows), wrappers)

    def _found(self, weight: Weight, unit: Unit) -> _Outcome:
        if weight.routed and not self.settings.grouped and not unit.mixtures:
            return Excluded("options={'grouped': False}")
        found = self.judge(weight)
        if not isinstance(found, Found):
            return found
        fitted = fit(found.weight, linear.compute_dtype(weight.products))
        return fitted if isinstance(fitted, Rejected) else replace(found, weight=fitted)

    def _whole(
        self, unit: Unit, founds: list[_Outcome], packed: Callable[[Weight, Found, Order | None], PackedFP4]
    ) -> _Whole:
        """The mixtures of a unit, or why they are none; None if it is not about any."""
        if isinstance(unit.mixtures, Rejected):
            return unit.mixtures
        if not unit.mixtures:
            return None
        first, second = zip(unit.weights, founds, strict=True)

        def both(order: Order | None) -> tuple[PackedFP4, PackedFP4]:
            assert isinstance(first[1], Found) and isinstance(second[1], Found)
            return packed(first[0], first[1], order), packed(second[0], second[1], None)

        if not all(isinstance(found, Found) for found in founds):
            return Rejected("no whole mixture: its other weight is left")
        proved = []
        for candidates in unit.mixtures:
            found = self.prover(candidates, both)
            if isinstance(found, Rejected):
                return found
            proved.append(found)
        return proved if len({p.order for p in proved}) == 1 else Rejected("no whole mixture: gates in several orders")

    def _alone(self, weight: Weight, found: _Outcome, whole: _Whole) -> _Outcome:
        """What becomes of a weight if it is not part of a whole mixture."""
        if isinstance(found, Found) and weight.routed and not self.settings.grouped and not isinstance(whole, list):
            return whole or Excluded("options={'grouped': False}")
        return found

    def _feed(self, weight: Weight, binding: Binding, packed: PackedFP4) -> list[fx.Node]:
        """Adds the inputs that are a packed weight."""
        leaves = tuple(self.placeholders.index(self.flat.origin[leaf]) for leaf in weight.decode.leaves)
        codes = leaves[weight.codes_leaf]
        self.bound.append(Bound(binding, leaves, codes))
        after = self.added[-1][0] if self.added else self.placeholders[-1]
        for member in ("words", "scales", "multiplier"):
            name = f"{member}_{len(self.bound)}"
            with self.regions.gm.graph.inserting_after(after):
                after, fake = add_static_input(after.graph, self.placeholders[codes], name, getattr(packed, member))
            self.added.append((after, fake))
        return [node for node, _ in self.added[-3:]]

    def _pieces(self, weight: Weight, packed: PackedFP4, inputs: list[fx.Node]) -> float | None:
        """Replaces the products of a weight; with ``verify``, says how far they are from their traced forms."""
        errors = []
        regions, origin = self.regions, self.flat.origin
        for product in weight.products:
            node = origin[product.node]
            inner = [regions.reach(n, node.graph) for n in inputs]
            self.used += [n for n in operands_of(product, product.node).values() if isinstance(n, fx.Node)]
            operands = operands_of(product, node)
            if product.node in weight.quantised:
                operands[product.x] = regions.reach(origin[weight.quantised[product.node]], node.graph)
            routing = None
            if product.route is not None:
                routing = operands["routing"] = regions.reach(origin[product.route.node], node.graph)
            written = linear.replace(product, node, packed, inner, operands[product.x], routing)
            self.gone.add(product.node)
            if self.settings.verify:
                error = worst_error(weight.decode, weight.values, product, operands, written, inner, packed)
                errors.append(error)
        routes = [product.route for product in weight.products if product.route is not None]
        self.gone |= {route.reader for route in routes if route.reader.users.keys() <= self.gone}
        return max(errors, default=None)

    def _mixture(self, proved: Proved, weights: list[Weight], fed: list[tuple[PackedFP4, list[fx.Node]]]) -> float:
        """Replaces a mixture; with ``verify``, says how far it is from its traced form."""
        m = proved.mixture
        graph = self.flat.origin[m.output].graph

        def reach(node: fx.Node) -> fx.Node:
            return self.regions.reach(self.flat.origin[node], graph)

        inner = [[self.regions.reach(n, graph) for n in inputs] for _, inputs in fed]
        moe.replace(proved, reach, [packed for packed, _ in fed], inner)
        read = [n for n in (*m.given, m.bias13, m.bias2, m.scores if proved.read_scores else None) if n is not None]
        self.used += read
        self.gone |= self.flow.idle(m.nodes, m.outputs, read)
        if not self.settings.verify:
            return 0.0
        return mixture_error(proved, weights, [packed for packed, _ in fed], self.constants, self.live)

    def _dead(self) -> set[fx.Node]:
        """The nodes that nothing needs any more."""
        constants = self.constants
        others = (node for node in self.flat.graph.nodes if node not in constants.nodes and node not in self.gone)
        roots = [n for node in others for n in node.all_input_nodes] + self.used
        needed = needed_by([n for n in roots if n in constants.nodes], constants)
        return {self.flat.origin[n] for n in (*(constants.nodes - needed), *self.gone)}


def _of(whole: _Whole) -> Proved | Rejected | None:
    return whole[0] if isinstance(whole, list) else whole
