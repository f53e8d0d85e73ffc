"""Runs what was read as a mixture of experts on random tokens: in float32, as it was traced and as an op."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.fake_impls.moe import moe
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import Product
from marlin_w4a16.passes.find.routes import as_rows, at_once, from_rows, multiply
from marlin_w4a16.passes.graph.constants import value_of_constant
from marlin_w4a16.passes.graph.nodes import evaluate, example, run
from marlin_w4a16.passes.graph.torch_private import size_at
from marlin_w4a16.passes.mixture.candidates import Candidate
from marlin_w4a16.passes.mixture.choices import Negatives
from marlin_w4a16.passes.mixture.dataflow import is_dynamic
from marlin_w4a16.passes.mixture.stacks import paired, unpaired
from marlin_w4a16.passes.outcome import Rejected

_CLOSE = 2e-5  # of float32 sums in another order, relative to the norm of a token
_LARGE, _MOST = 10.0, 5e3  # tokens of this size may differ more, but by no more than so many times
_DRAWS = 3  # at least
_SMALLEST, _LARGEST = -3, 6  # the scales of tokens, as powers of ten
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True, slots=True)
class Proved:
    """A mixture and what was found of it.

    Attributes:
        mixture: which of the candidates it is.
        activation: what stands between its products.
        order: which rows of the first one are gates.
        negatives: what ids below zero are.
    """

    mixture: Candidate
    activation: Activation
    order: Order | None
    negatives: Negatives

    @property
    def read_scores(self) -> bool:
        """Whether its routing weights are read from the scores at the ids: every token goes to all experts."""
        return self.mixture.first.route is None


class Trial:
    """Runs a mixture in float32, as it was traced and as an op with these packed weights."""

    def __init__(self, proved: Proved, w13: PackedFP4, w2: PackedFP4) -> None:
        self.proved, self.mixture = proved, proved.mixture
        self._packed = {self.mixture.first.node: (w13, proved.order), self.mixture.second.node: (w2, None)}
        self._weights = w13, w2
        self.device = example(self.mixture.x).device
        self._generator = torch.Generator().manual_seed(0)
        self.biases = tuple(bias for bias in (self.mixture.bias13, self.mixture.bias2) if bias is not None)
        fixed = (node for node in self.mixture.constants if node not in self.biases)
        self._fixed = {node: _wide(value_of_constant(node, self.mixture.known, {})) for node in fixed}

    def run(self) -> Rejected | None:
        """Why the op does not give what was traced, or None."""
        for times in (1, 3) if is_dynamic(self.mixture) else (1,):
            traced = list(self._traced_draws(times))
            if not any(bool(values[self.mixture.second.x_node].any()) for values in traced):
                return Rejected("its weights give too little to try it with")
            wrong = self._difference(traced)
            if not wrong <= _CLOSE:
                return Rejected(
                    f"what was traced is no mixture with {self.proved.activation}",
                    f"on random tokens they differ by {wrong:.2g}, expected {_CLOSE:g} at most",
                )
        return None

    def _traced_draws(self, times: int) -> Iterator[dict[fx.Node, Any]]:
        """What was traced, of tokens of all sizes, all experts, and numbers of none where the graph may have them."""
        m = self.mixture
        pairs = math.prod(_sizes(m.ids, times))
        count = max(_DRAWS, -(-m.experts // pairs))
        biases = {bias: _random(_sizes(bias, 1), self.device, self._generator) for bias in self.biases}
        for draw in range(count):
            yield self._traced(random_tokens(m, self.device, self._generator, times, (draw, count)) | biases, times)
        if not m.ranked and m.scores is None and self.device.type == "cpu":  # a CUDA device does not survive it
            given = random_tokens(m, self.device, self._generator, times)
            given[m.ids].flatten()[::2] = m.experts
            given[m.weights].flatten()[::2] = 0.0
            with contextlib.suppress(IndexError, RuntimeError):  # the model may not allow for it
                yield self._traced(given | biases, times)

    def _traced(self, given: dict[fx.Node, Any], times: int) -> dict[fx.Node, Any]:
        """The values of what is compared, in float32 where 16 bits were traced."""
        m = self.mixture
        products = {m.first.node: m.first, m.second.node: m.second}

        def compute(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
            if node.op == "placeholder":
                return size_at(example(node), times)
            which = products.get(node)
            if which is None:
                return _run_wide(node, values)
            routing = values[which.route.node] if which.route else None
            return _multiplied(which, *self._packed[node], values[which.x_node], routing)

        shapes = {node: torch.zeros(_sizes(node, times), device=self.device) for node in m.shapes}
        nodes = [node for node in m.nodes if node not in m.gathers]
        kept = {*m.given, *self.biases, m.output, m.second.x_node, *([m.scores] if m.scores else [])}
        with torch.autocast(self.device.type, enabled=False):
            values = evaluate(nodes, given | self._fixed | shapes, compute)
        return {node: values[node] for node in kept}

    def _difference(self, traced: list[dict[fx.Node, Any]]) -> float:
        """The largest difference of a token, relative to its norm: all draws go through the op at once.

        Sums of large tokens are rounded to steps that are large beside the sums at which an activation bends.
        """
        m = self.mixture
        rows = [node for node in (*m.given, m.output, m.scores) if node is not None]
        together = {node: torch.cat([values[node].float() for values in traced]) for node in rows if node is not m.ids}
        together[m.ids] = torch.cat([values[m.ids] for values in traced])
        together |= {bias: traced[0][bias] for bias in self.biases}
        found, expected = as_op(self.proved, *self._weights, together), together[m.output]
        size = expected.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        tokens = together[m.x].float().square().mean(1).sqrt()
        return float(((found - expected).norm(dim=1) / size / (tokens / _LARGE).clamp(1.0, _MOST)).max())


def random_tokens(
    m: Candidate,
    device: torch.device,
    generator: torch.Generator,
    times: int = 1,
    draw: tuple[int, int] | None = None,
) -> dict[fx.Node, Tensor]:
    """Random tokens, experts and routing weights from -2 to 2.

    Args:
        m: the mixture.
        device: where they are to be.
        generator: of the CPU.
        times: so many times the tokens that were traced.
        draw: its number, and how many there are, in which all experts have their turn, tokens are of all sizes, and
            some weights are zero or tiny; None: tokens of one size.
    """
    t, k = _sizes(m.ids, times)
    x = _random(_sizes(m.x, times), device, generator)
    weights = torch.rand((t * k,), generator=generator, device="cpu") * 2
    signs = torch.randint(2, (t, m.experts), generator=generator, device="cpu") * 2 - 1
    ids = torch.randint(m.experts, (t, k), generator=generator, device="cpu")
    if m.scores is not None:  # an expert that were chosen twice would have one score only
        ids = torch.rand((t, m.experts), generator=generator, device="cpu").argsort(1)[:, :k]
    if draw is not None:
        number, count = draw
        share = (torch.arange(t) * count + number) / max(1, t * count - 1)
        x *= (10 ** (_SMALLEST + (_LARGEST - _SMALLEST) * share)).to(device)[:, None]
        weights[3::7], weights[5::11] = 0.0, 1e-6
        if m.scores is None and number * t * k < m.experts:
            turns = torch.randperm(m.experts, generator=torch.Generator().manual_seed(0))  # not in the order of sorting
            ids = turns[torch.arange(number * t * k, (number + 1) * t * k).view(t, k) % m.experts]
    weights = weights.view(t, k) * signs.gather(1, ids)  # one sign for an expert that were chosen twice: no sum is zero
    return {m.x: x, m.ids: ids.to(device, example(m.ids).dtype), m.weights: weights.to(device)}


def _sizes(node: fx.Node, times: int) -> tuple[int, ...]:
    return tuple(size_at(size, times) for size in example(node).shape)


def _random(shape: tuple[int, ...], device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu").to(device)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _WIDER else value


def _run_wide(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What a node computes, in float32 where 16 bits were traced."""
    if node.op == "call_method" and node.target in ("half", "bfloat16"):
        return values[node.all_input_nodes[0]].float(*node.args[1:], **node.kwargs)
    return run(node, values, lambda value: _WIDER.get(value, value) if isinstance(value, torch.dtype) else value)


def _multiplied(product: Product, packed: PackedFP4, order: Order | None, x: Tensor, routing: Tensor | None) -> Tensor:
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


def as_op(proved: Proved, w13: PackedFP4, w2: PackedFP4, values: Mapping[fx.Node, Any]) -> Tensor:
    """What the op gives for the tokens of which a trial has left the values."""
    m = proved.mixture
    x, ids, weights = (values[node] for node in m.given)
    if proved.read_scores and m.scores is not None:
        weights = values[m.scores].gather(1, ids.long())
    ids = proved.negatives.applied(at_once, ids, m.experts)
    bias13, bias2 = (None if bias is None else values[bias] for bias in (m.bias13, m.bias2))
    if bias13 is not None and proved.order is not None:
        bias13 = paired(bias13, proved.order)
    return moe(
        x, w13, w2, weights, ids, activation=proved.activation, bias13=bias13, bias2=bias2, weight_on_input=m.on_input
    )
