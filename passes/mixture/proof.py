"""Proves that a part of a graph is a mixture of experts: once for all that are structured alike."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.mixture.activation import line_of, recognise_activation
from marlin_w4a16.passes.mixture.candidates import Candidate
from marlin_w4a16.passes.mixture.dataflow import read_for_all
from marlin_w4a16.passes.mixture.ranges import out_of_range
from marlin_w4a16.passes.mixture.slopes import other_slope
from marlin_w4a16.passes.mixture.trial import Proved, Trial
from marlin_w4a16.passes.mixture.values import NotUnderstood
from marlin_w4a16.passes.outcome import Rejected, raised

Packed = Callable[[Order | None], tuple[PackedFP4, PackedFP4]]  # packs both weights, rows of the first in pairs


class Prover:
    """Proves mixtures of a graph; those that are structured alike are proved once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[int, Proved] | Rejected] = {}

    def __call__(self, candidates: list[Candidate], packed: Packed) -> Proved | Rejected:
        """The first of some candidates that is a mixture, or why the first is none."""
        key = tuple(map(_signature, candidates))
        if key not in self._known:
            try:
                self._known[key] = self._prove(candidates, packed)
            except Exception as error:
                self._known[key] = Rejected(f"no whole mixture: {raised(error).reason}")
        found = self._known[key]
        return found if isinstance(found, Rejected) else replace(found[1], mixture=candidates[found[0]])

    def _prove(self, candidates: list[Candidate], packed: Packed) -> tuple[int, Proved] | Rejected:
        """First read, then tried: what was read says what to try."""
        refusals = []
        for place, mixture in enumerate(candidates):
            proved = _read(mixture)
            if isinstance(proved, Proved):
                refused = Trial(proved, *packed(proved.order)).run()
                if refused is None:
                    return place, proved
                refusals.append((len(mixture.nodes), refused))
            else:
                refusals.append(proved)
        _, first = max(refusals, key=lambda refusal: refusal[0])
        return Rejected(f"no whole mixture: {first.why}", first.detail, first.rounds)


def _read(mixture: Candidate) -> Proved | tuple[int, Rejected]:
    """What was read of a mixture; or how many nodes were understood, and why no more."""
    try:
        understood = read_for_all(mixture)
    except NotUnderstood as why:
        return why.read, Rejected(str(why), rounds=why.rounds)
    bends = understood.bends
    activation = recognise_activation(understood.function, understood.orders, bends.numbers, bends.points)
    if isinstance(activation, Rejected):
        return len(mixture.nodes), activation
    gates_first, dtype = activation[1] is understood.orders[0], example(mixture.first.node).dtype
    refused = out_of_range(understood.function, activation[0], gates_first, dtype)
    if refused is None and mixture.trained:
        line = line_of(bends.numbers, bends.points)
        refused = other_slope(understood.function, activation[0], gates_first, line)
    return (len(mixture.nodes), refused) if refused else Proved(mixture, *activation, understood.negatives)


def _signature(m: Candidate) -> str:
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
            return traced(node)
        is_bias = node in (m.bias13, m.bias2)
        told = "constant" if is_bias else f"{node.target} {fx.map_arg((node.args, node.kwargs), shown)}"
        return f"{told} {traced(node)}" if isinstance(value, Tensor) else told

    def traced(node: fx.Node) -> str:
        """What was traced of it: sizes that may change have names, and the autocast that it stands in counts."""
        value = example(node)
        tensor = (
            (value.dtype, *map(str, value.shape), value.requires_grad) if isinstance(value, Tensor) else type(value)
        )
        return repr((tensor, node.meta.get("autocast")))

    given = list(map(traced, m.given))
    nodes = [
        (node.op, str(node.target), repr(fx.map_arg((node.args, node.kwargs), shown)), traced(node)) for node in m.nodes
    ]
    which = m.nodes.index(m.output), m.scores and m.nodes.index(m.scores), m.on_input, m.ranked
    return repr((given, nodes, which, m.first.matrices, m.second.matrices, m.first.equation, m.second.equation))
