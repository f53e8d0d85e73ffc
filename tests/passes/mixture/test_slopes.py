"""What stands between products where few inputs show it: slopes, and what sets in between the points of a grid."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import hardtanh, relu, silu

from mixtures.noted import note
from mixtures.written import Mixture, Parts, batched, halves, inputs, interleaved

RECTIFIED = {
    "relu": (relu, True),
    "clamp": (lambda s: s.clamp(min=0), False),
    "maximum": (lambda s: torch.maximum(s, torch.zeros(())), False),
    "detached": (lambda s: relu(s.detach()), False),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("activation, alike", RECTIFIED.values(), ids=RECTIFIED)
def test_slopes_at_zero_count_where_gradients_are_asked_for(activation, alike, trained):
    """The sums of padding tokens, which are zero, are there."""
    x, weights, ids = inputs()
    x[::2] = 0.0
    given = (x.requires_grad_(trained), weights, ids)
    module = Mixture(Parts(batched, activation, gated=False))
    told = note(module, given)
    assert (told is None) == (alike or not trained), told


@pytest.mark.parametrize("activation", [halves, interleaved])
def test_slopes_of_activations_are_their_own(activation):
    x, weights, ids = inputs()
    assert note(Mixture(Parts(batched, activation)), (x.requires_grad_(), weights, ids)) is None


def bump(sums: Tensor) -> Tensor:
    """Of gates of 0.05."""
    gate, up = sums.chunk(2, -1)
    t = gate * 200 - 10
    return silu(gate) * up * (1 + 1000 * torch.exp(-(t * t) - 1))


def window(sums: Tensor) -> Tensor:
    """Of gates between two that are 0.008 apart."""
    gate, up = sums.chunk(2, -1)
    t = (gate * 0.125 - 6.29625) * 2000
    return silu(gate) * up * (1 + 1000 * relu(1 - t * t))


def limited(sums: Tensor) -> Tensor:
    gate, up = sums.chunk(2, -1)
    hardtanh(gate, -1e8, 1e8, True)
    return silu(gate) * up


@pytest.mark.parametrize("activation", [bump, window, limited])
def test_what_few_sums_show(activation):
    assert note(Mixture(Parts(batched, activation)), inputs(tokens=1)) is not None


def test_tokens_that_are_weighted_before_they_are_cast_to_float16():
    class OnInput(Mixture):
        def expert(self, x, weight, chosen, multiply):
            sums = multiply((x * weight).half(), self.gate_up_proj)
            return multiply(halves(sums), self.down_proj)

    module, (x, weights, ids) = OnInput(Parts(batched), dtype=torch.float16), inputs()
    x[3] *= 1e5
    weights[3] *= 1e-4
    found = torch.compile(module, backend="marlin_w4a16")(x, weights, ids)
    expected = module(x, weights, ids)
    assert bool(expected.isfinite().all()) and (found - expected).norm() <= 1e-2 * expected.norm()
