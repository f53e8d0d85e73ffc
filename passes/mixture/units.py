"""What is judged together: a weight alone, or the two weights of mixtures of experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from marlin_w4a16.passes.graph.constants import Constants
from marlin_w4a16.passes.graph.flow import Flow
from marlin_w4a16.passes.graph.regions import Flat, Regions
from marlin_w4a16.passes.judge.weights import Weight, find_weights
from marlin_w4a16.passes.mixture.candidates import Candidate, Pair, find_pairs
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.settings import Settings


@dataclass(slots=True, eq=False)
class Unit:
    """Weights that are judged together.

    Attributes:
        weights: one, or those of the first and the second product of its mixtures.
        mixtures: the candidates for each mixture, or why there is none.
    """

    weights: list[Weight]
    mixtures: list[list[Candidate]] | Rejected = field(default_factory=list)


def find_units(
    flat: Flat,
    regions: Regions,
    constants: Constants,
    inputs: Sequence[Any],
    settings: Settings,
    flow: Callable[[], Flow],
) -> list[Unit]:
    """The weights that could be FP4, each in one unit, in the order in which the graph uses them."""
    weights = list(find_weights(flat, regions, constants, inputs, settings))
    if not settings.moe or not any(weight.routed for weight in weights):
        return [Unit([weight]) for weight in weights]
    products = [product for weight in weights for product in weight.products]
    owner = {product.node: weight for weight in weights for product in weight.products}
    pairs = find_pairs(sorted(products, key=lambda product: product.node), flow())
    units: dict[Weight, Unit] = {}
    for pair in pairs:
        first, second = owner[pair.first.node], owner[pair.second.node]
        unit = units.get(first) or units.get(second)
        if unit is None:
            unit = units[first] = units[second] = Unit([first, second])
        if unit.weights != [first, second]:
            unit.mixtures = Rejected("no whole mixture: its weights belong to several")
        if isinstance(unit.mixtures, list):
            candidates = _visible(pair, flat, regions)
            unit.mixtures = candidates if isinstance(candidates, Rejected) else [*unit.mixtures, candidates]
    alone = [Unit([weight]) for weight in weights if weight not in units]
    found = list(dict.fromkeys(units.get(weight) or alone.pop(0) for weight in weights))
    for unit in found:
        uses = {product.node for weight in unit.weights for product in weight.products}
        whole = [m[0] for m in unit.mixtures] if isinstance(unit.mixtures, list) else []
        if whole and uses != {product.node for m in whole for product in (m.first, m.second)}:
            unit.mixtures = Rejected("no whole mixture: its weights are used elsewhere too")
        if whole and any(weight.quantised for weight in unit.weights):
            unit.mixtures = Rejected("no whole mixture: the quantisation of its inputs is left out")
    return found


def _visible(pair: Pair, flat: Flat, regions: Regions) -> list[Candidate] | Rejected:
    """The candidates of a pair that lie in one region."""
    if isinstance(pair.candidates, Rejected):
        return pair.candidates

    def in_one(mixture: Candidate) -> bool:
        graph = flat.origin[mixture.output].graph
        inner = (node for node in mixture.nodes if node.op != "placeholder")
        given: list[fx.Node] = [*mixture.given, *mixture.constants, *mixture.shapes]
        return all(flat.origin[node].graph is graph for node in inner) and all(
            regions.sees(flat.origin[node], graph) for node in given
        )

    return [m for m in pair.candidates if in_one(m)] or Rejected("no whole mixture: it begins or ends inside a region")
