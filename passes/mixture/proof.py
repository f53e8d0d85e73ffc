"""Proves that a part of a graph is a mixture of experts: once for all that are structured alike."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.graph.constants import Constants
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.graph.torch_private import size_hint
from marlin_w4a16.passes.mixture.candidates import Candidate
from marlin_w4a16.passes.mixture.trial import Proved, Trial
from marlin_w4a16.passes.outcome import Rejected, raised

Packed = Callable[[Order | None], tuple[PackedFP4, PackedFP4]]


class Prover:
    """Proves mixtures of a graph; those that are structured alike are proved once."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._known: dict[Any, tuple[int, Activation, Order | None, bool] | Rejected] = {}

    def known(self, candidates: list[Candidate]) -> Proved | Rejected | None:
        """What is known of these without running anything."""
        found = self._known.get(_signatures(candidates))
        if found is None or isinstance(found, Rejected):
            return found
        return Proved(candidates[found[0]], *found[1:])

    def __call__(self, candidates: list[Candidate], packed: Packed) -> Proved | Rejected:
        """The first of some candidates that is a mixture, or why the first is none.

        Args:
            candidates: at least one.
            packed: packs the weights, the rows of the first one in pairs of an order.
        """
        found = self.known(candidates)
        if found is None:
            try:
                found = self._prove(candidates, packed)
            except Exception as error:
                found = Rejected(f"no whole mixture: {raised(error).reason}")
            key = _signatures(candidates)
            if isinstance(found, Rejected):
                self._known[key] = found
            else:
                place = candidates.index(found.mixture)
                self._known[key] = place, found.activation, found.order, found.read_scores
        return found

    def _prove(self, candidates: list[Candidate], packed: Packed) -> Proved | Rejected:
        reasons = []
        for mixture in candidates:
            trial = Trial(mixture, self._constants)
            activation = trial.activation()
            if isinstance(activation, Rejected):
                reasons.append(activation)
                continue
            weights = packed(activation[1])
            for read_scores in (False, True) if mixture.scores is not None else (False,):
                proved = Proved(mixture, *activation, read_scores)
                refused = trial.compare(proved, *weights)
                if refused is None:
                    return proved
                reasons.append(refused)
        return Rejected(f"no whole mixture: {reasons[0].why}", reasons[0].detail)


def _signatures(candidates: list[Candidate]) -> tuple[Any, ...]:
    return tuple(_signature(mixture) for mixture in candidates)


def _signature(m: Candidate) -> Any:
    """What a mixture computes, whatever its nodes are called and its weights hold."""
    index: dict[fx.Node, str] = {node: f"%{i}" for i, node in enumerate(m.nodes)}
    index |= {node: f"given {i}" for i, node in enumerate(m.given)}

    def shown(node: fx.Node) -> str:
        if node in index:
            return index[node]
        if node in (m.first.weight_node, m.second.weight_node):
            return "stack"
        value = example(node)
        if node not in m.known:
            return f"{value.dtype} {list(map(size_hint, value.shape))}"
        told = (
            "constant"
            if node in (m.bias13, m.bias2)
            else f"{node.target} {fx.map_arg((node.args, node.kwargs), shown)}"
        )
        return f"{told} {value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else told

    given = [(example(node).dtype, list(map(size_hint, example(node).shape))) for node in m.given]
    nodes = [(node.op, str(node.target), repr(fx.map_arg((node.args, node.kwargs), shown))) for node in m.nodes]
    which = m.nodes.index(m.output), m.scores and m.nodes.index(m.scores), m.on_input
    return repr((given, nodes, which, m.first.matrices, m.second.matrices, m.first.equation, m.second.equation))
