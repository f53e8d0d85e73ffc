"""Runs what may be a mixture of experts on random tokens: in float32, as it was traced and as an op."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.fake_impls.moe import moe
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order, kinds
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import Product
from marlin_w4a16.passes.find.routes import as_rows, at_once, from_rows, multiply, ordered
from marlin_w4a16.passes.graph.constants import value_of_constant
from marlin_w4a16.passes.graph.nodes import evaluate, example, run, sizes
from marlin_w4a16.passes.mixture.activation import recognise_activation
from marlin_w4a16.passes.mixture.candidates import Candidate
from marlin_w4a16.passes.mixture.stacks import paired, unpaired
from marlin_w4a16.passes.outcome import Rejected

_CLOSE = 2e-5  # of float32 sums in another order, relative to the norm of a token
_BEYOND = 0.1  # how many sums are to be beyond a limit, on each side
_DRAWS = 3
_Multiply = Callable[[Product, Tensor, Tensor | None], Tensor]  # a product, its input, what routes its rows
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True, slots=True)
class Proved:
    """A mixture and what was found of it.

    Attributes:
        mixture: which of the candidates it is.
        activation: what stands between its products.
        order: which rows of the first one are gates.
        read_scores: its routing weights are read from the scores at the ids.
    """

    mixture: Candidate
    activation: Activation
    order: Order | None
    read_scores: bool


class Trial:
    """Runs one candidate in float32, as it was traced and as an op."""

    def __init__(self, mixture: Candidate) -> None:
        self.mixture = mixture
        self.device = example(mixture.x).device
        self.generator = torch.Generator().manual_seed(0)
        self.biases = tuple(bias for bias in (mixture.bias13, mixture.bias2) if bias is not None)
        fixed = (node for node in mixture.constants if node not in self.biases)
        self.fixed: dict[fx.Node, Any] = {node: value_of_constant(node, mixture.known, {}) for node in fixed}
        self.fixed |= {node: torch.zeros_like(_random(node, self.device, self.generator)) for node in mixture.shapes}

    def activation(self) -> tuple[Activation, Order | None] | Rejected:
        """What stands between the products, and the order of gates and ups."""
        m = self.mixture
        first, second, stop = m.first, m.second, m.nodes.index(m.second.node)
        given = self.given()
        given |= {bias: torch.zeros_like(given[bias]) for bias in self.biases}
        lead = _lead(first)
        count = math.prod(lead)

        def between(sums: Tensor) -> Tensor:
            shaped = from_rows(at_once, first.equation, (), lead, sums)
            values = self.run(m.nodes[:stop], given, lambda *_: shaped)
            rows: Tensor = as_rows(at_once, second.equation, values[second.x_node])[0]
            return rows

        def function(sums: Tensor) -> Tensor:
            """Of any number of rows, as many at a time as were traced."""
            parts = torch.split(sums, count)
            pads = (torch.nn.functional.pad(part, (0, 0, 0, count - len(part))).clone() for part in parts)
            return torch.cat([between(pad)[: len(part)] for pad, part in zip(pads, parts, strict=True)])

        return recognise_activation(function, first.matrices.n, m.numbers, self.device)

    def compare(self, proved: Proved, w13: PackedFP4, w2: PackedFP4) -> Rejected | None:
        """Why the op does not give what was traced, or None."""
        limits = [n for n in (proved.activation.gate_limit, proved.activation.up_limit) if n is not None]
        sums: list[Tensor] = []

        def product(which: Product, x: Tensor, routing: Tensor | None) -> Tensor:
            if which is self.mixture.second:
                return _multiplied(which, w2, x, routing, None)
            y = _multiplied(which, w13, x, routing, proved.order)
            axes = which.equation
            sums.append(ordered(at_once, y, axes.out, axes.batch + axes.free + axes.rows))
            return y

        scale, wrong = 1.0, 0.0
        for draw in range(_DRAWS):
            # a CUDA device does not survive an index that does not exist
            past_the_end = draw == _DRAWS - 1 and self.device.type == "cpu"
            given = self.given(scale, past_the_end)
            try:
                values = self.run(self.mixture.nodes, given, product)
            except (IndexError, RuntimeError):
                if not past_the_end:
                    raise
                break  # the model does not allow for experts that there are not
            found = as_op(proved, w13, w2, values)
            wrong = max(wrong, _worst(found, values[self.mixture.output].float()))
            if not wrong <= _CLOSE:
                return Rejected(
                    f"what was traced is no mixture with {proved.activation}",
                    f"on random tokens they differ by {wrong:.2g}, expected {_CLOSE:g} at most",
                )
            if draw == 0:
                reach = _reach(sums[0], proved.order)
                if not reach:
                    return Rejected("its weights give too little to try it with")
                scale = max([10.0, *(1.5 * limit / reach for limit in limits)])
        return None

    def given(self, scale: float = 1.0, past_the_end: bool = False) -> dict[fx.Node, Any]:
        """What enters it: random tokens, so much larger, and random biases."""
        found = random_tokens(self.mixture, self.device, self.generator, past_the_end)
        found[self.mixture.x] *= scale
        return found | {bias: _random(bias, self.device, self.generator) for bias in self.biases}

    def run(self, nodes: list[fx.Node], given: dict[fx.Node, Any], product: _Multiply) -> dict[fx.Node, Any]:
        """The values of some nodes, in float32 where 16 bits were traced."""
        m = self.mixture

        def compute(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
            which = {m.first.node: m.first, m.second.node: m.second}.get(node)
            if which is not None:
                return product(which, values[which.x_node], values[which.route.node] if which.route else None)
            return _run_wide(node, values)

        with torch.autocast(self.device.type, enabled=False):
            return evaluate([node for node in nodes if node not in m.gathers], given | self.fixed, compute)


def random_tokens(
    m: Candidate, device: torch.device, generator: torch.Generator, past_the_end: bool = False
) -> dict[fx.Node, Tensor]:
    """Random tokens, unequal routing weights, and experts: the same twice for a token, some never, or past the end."""
    t, k = sizes(m.ids)
    if m.scores is None:
        few = torch.randperm(m.experts, generator=generator, device="cpu")[: k + 1]
        ids = few[torch.randint(len(few), (t, k), generator=generator, device="cpu")]
        if past_the_end:
            ids[::2, 0] = m.experts
    else:  # an expert that were chosen twice would have one score only
        ids = torch.rand((t, m.experts), generator=generator, device="cpu").argsort(1)[:, :k]
    weights = 0.5 + _random(m.weights, device, generator).abs()
    return {m.x: _random(m.x, device, generator), m.ids: ids.to(device, example(m.ids).dtype), m.weights: weights}


def _random(like: fx.Node, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(sizes(like), generator=generator, device="cpu").to(device)


def _run_wide(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node computes, in float32 where 16 bits were traced."""
    if node.op == "call_method" and node.target in ("half", "bfloat16"):
        return values[node.all_input_nodes[0]].float(*node.args[1:], **node.kwargs)
    return run(node, values, lambda value: _WIDER.get(value, value) if isinstance(value, torch.dtype) else value)


def _multiplied(product: Product, packed: PackedFP4, x: Tensor, routing: Tensor | None, order: Order | None) -> Tensor:
    """A product by its packed weight, whose rows may be in pairs."""
    axes, route, experts = product.equation, product.route, product.matrices.batch
    if route is not None and route.by == "ids" and routing is not None and bool((routing >= experts).any()):
        raise IndexError("no such expert")

    def linear(rows: Tensor, offsets: Tensor) -> Tensor:
        y = grouped_linear(rows, packed, offsets)
        return y if order is None else unpaired(y, order)

    rows, lead = as_rows(at_once, axes, x.float())
    each = math.prod(lead[len(axes.batch) :])
    y: Tensor = from_rows(at_once, axes, (), lead, multiply(at_once, linear, route, rows, routing, experts, each))
    return y


def as_op(proved: Proved, w13: PackedFP4, w2: PackedFP4, values: dict[fx.Node, Any]) -> Tensor:
    """What the op gives for the tokens of which a trial has left the values."""
    m = proved.mixture
    x, ids, weights = (values[node] for node in m.given)
    if proved.read_scores and m.scores is not None:
        weights = values[m.scores].gather(1, ids.long())
    bias13, bias2 = (None if bias is None else values[bias] for bias in (m.bias13, m.bias2))
    if bias13 is not None and proved.order is not None:
        bias13 = paired(bias13, proved.order)
    return moe(
        x, w13, w2, weights, ids, activation=proved.activation, bias13=bias13, bias2=bias2, weight_on_input=m.on_input
    )


def _lead(product: Product) -> list[int]:
    """The sizes, when it was traced, of the axes of a product's input that are rows."""
    axes, shape = product.equation, sizes(product.x_node)
    return [shape[axes.x.index(label)] for label in axes.batch + axes.free]


def _reach(sums: Tensor, order: Order | None) -> float:
    """What a tenth of the gates, and of the ups, are beyond, on either side."""
    parts = [sums[..., at].flatten()[: 1 << 20].sort().values for at in kinds(order, sums.shape[-1])]
    tenth = int(_BEYOND * (len(parts[0]) - 1))
    return max(0.0, min(min(-float(part[tenth]), float(part[-1 - tenth])) for part in parts))


def _worst(found: Tensor, expected: Tensor) -> float:
    """The largest difference of a token, relative to its norm."""
    size = expected.norm(dim=1)
    floor = max(1e-3 * float(size.mean()), torch.finfo(torch.float32).tiny)
    return float(((found - expected).norm(dim=1) / size.clamp(min=floor)).max())
