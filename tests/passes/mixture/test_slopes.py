"""What stands between products where few inputs show it: slopes, and what sets in between the points of a grid."""

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import hardtanh, relu, silu

from mixtures.noted import note
from mixtures.written import Mixture, Parts, batched, halves, inputs, interleaved

RECTIFIED = {
    "relu": (relu, True),
    "clamp": (lambda s: s.clamp(min=0), Version(torch.__version__) >= Version("2.14")),
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


def two_bells(sums: Tensor) -> Tensor:
    """Of gates of 0.0537, between those at which each is largest."""
    gate, up = sums.chunk(2, -1)
    t = gate * 2000 - 107.4
    bells = [7e11 * torch.exp(-((t - at) * (t - at))) for at in (5, -5)]
    return silu(gate) * up * (1 + bells[0] * bells[1])


@pytest.mark.parametrize("activation", [bump, window, limited, two_bells])
def test_what_few_sums_show(activation):
    assert note(Mixture(Parts(batched, activation)), inputs(tokens=1)) is not None


LIMITS = {
    "clamp": lambda u: u.clamp(-7.0, 7.0),
    "hardtanh": lambda u: hardtanh(u, -7.0, 7.0),
    "minimum": lambda u: torch.maximum(torch.minimum(u, torch.tensor(7.0)), torch.tensor(-7.0)),
}


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", LIMITS)
def test_slopes_at_limits_count_where_gradients_are_asked_for(name):
    """The sums of padding tokens are the bias, which is the limit."""

    def activation(sums: Tensor) -> Tensor:
        gate, up = sums.chunk(2, -1)
        return silu(gate) * LIMITS[name](up)

    module, gradients = Mixture(Parts(batched, activation, bias=True)), []
    module.bias13.fill_(7.0)
    x, weights, ids = inputs()
    x[::2] = 0.0
    for run in (torch.compile(module, backend="marlin_w4a16"), module):
        given = x.clone().requires_grad_()
        run(given, weights, ids).square().sum().backward()
        gradients.append(given.grad[::2])
    found, expected = gradients
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("on_input, tokens, weight", [(False, 1.0, 8e3), (True, 1e6, 1e-5)])
def test_what_float16_does_not_hold_under_autocast(on_input, tokens, weight):
    module, (x, weights, ids) = Mixture(Parts(batched, on_input=on_input)), inputs()

    def lowered(*args):
        with torch.autocast("cpu", torch.float16):
            return module(*args)

    args = x * tokens, weights * weight, ids
    found, expected = torch.compile(lowered, backend="marlin_w4a16")(*args), lowered(*args)
    assert bool(expected.isfinite().all()) and (found - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.usefixtures("without_inductor")
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
