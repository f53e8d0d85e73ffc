"""What is judged together: a weight alone, or the two weights of mixtures of experts."""

from dataclasses import dataclass, field

from torch import fx

from marlin_w4a16.passes.graph.traced import Traced
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


def find_units(traced: Traced, settings: Settings) -> list[Unit]:
    """The weights that could be FP4, each in one unit, in the order in which the graph uses them."""
    weights = list(find_weights(traced, settings))
    if not settings.moe or not any(weight.routed for weight in weights):
        return [Unit([weight]) for weight in weights]
    products = [product for weight in weights for product in weight.products]
    owner = {product.node: weight for weight in weights for product in weight.products}
    pairs = find_pairs(sorted(products, key=lambda product: product.node), traced.flow)
    units: dict[Weight, Unit] = {}
    for pair in pairs:
        first, second = owner[pair.first.node], owner[pair.second.node]
        unit = units.get(first) or units.get(second)
        if unit is None:
            unit = units[first] = units[second] = Unit([first, second])
        if unit.weights != [first, second]:
            unit.mixtures = Rejected("no whole mixture: its weights belong to several")
        if isinstance(unit.mixtures, list):
            candidates = _visible(pair, traced)
            unit.mixtures = candidates if isinstance(candidates, Rejected) else [*unit.mixtures, candidates]
    found = list(dict.fromkeys(units.setdefault(weight, Unit([weight])) for weight in weights))
    for unit in found:
        uses = {product.node for weight in unit.weights for product in weight.products}
        whole = [m[0] for m in unit.mixtures] if isinstance(unit.mixtures, list) else []
        if whole and uses != {product.node for m in whole for product in (m.first, m.second)}:
            unit.mixtures = Rejected("no whole mixture: its weights are used elsewhere too")
        if whole and any(weight.quantised for weight in unit.weights):
            unit.mixtures = Rejected("no whole mixture: the quantisation of its inputs is left out")
    return found


def _visible(pair: Pair, traced: Traced) -> list[Candidate] | Rejected:
    """The candidates of a pair that lie in one region."""
    if isinstance(pair.candidates, Rejected):
        return pair.candidates
    origin = traced.flat.origin

    def in_one(mixture: Candidate) -> bool:
        inner = (node for node in mixture.nodes if node.op != "placeholder")
        given: list[fx.Node] = [*mixture.given, *mixture.constants, *mixture.shapes]
        return all(origin[node].graph is origin[mixture.output].graph for node in inner) and all(
            traced.sees(node, mixture.output) for node in given
        )

    return [m for m in pair.candidates if in_one(m)] or Rejected("no whole mixture: it begins or ends inside a region")
