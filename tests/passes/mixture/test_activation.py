"""The activation of an expert, told by what it does to data: right, or refused with the point that differs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marlin_w4a16.kernels.activation import FUNCTIONS, Activation
from marlin_w4a16.kernels.expert_order import ORDERS
from marlin_w4a16.passes.mixture.activation import recognise_activation
from marlin_w4a16.passes.outcome import Rejected
from mixtures.activations import CLAMPED, GPT_OSS, deepseek_v4, gpt_oss, qwen, watched

HALVES, SIDES = (ORDERS[0], ORDERS[1]), (ORDERS[2], ORDERS[3])


def recognised(function, numbers, order="gate_up", bends=()):
    """What is recognised of a function of sums ``[..., 2]``, or ``[..., 1]`` without an order."""
    orders = (None,) if order is None else SIDES if order.startswith("interleaved") else HALVES
    return recognise_activation(lambda *z: function(torch.stack(z, -1))[..., 0], orders, numbers, bends)


def split(sums: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """Gates and ups."""
    pair = (sums[..., ::2], sums[..., 1::2]) if order.startswith("interleaved") else sums.chunk(2, dim=-1)
    return pair[::-1] if order.endswith("up_gate") else pair


def in_place(sums: Tensor) -> Tensor:
    """As a kernel's reference writes it: nothing is left of what it was given."""
    gate, up = sums.chunk(2, dim=-1)
    return torch.minimum(gate, torch.tensor(10.0), out=gate).div_(1 + torch.exp(-gate)).mul_(up.clamp_(-10, 10))


def gelu_by_hand(sums: Tensor) -> Tensor:
    gate, up = sums.chunk(2, dim=-1)
    return 0.5 * gate * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * gate**3))) * up


MODELS = {
    "Qwen3": (qwen, (), Activation(), "gate_up"), "DeepSeek-V4": (deepseek_v4, (10.0,), CLAMPED, "gate_up"),
    "gpt-oss": (gpt_oss, (7.0, -7.0, 1.702, 1.0), GPT_OSS, "interleaved"),
    "NemotronH": (lambda s: F.relu(s).square(), (), Activation("relu2", False), None),
    "relu": (lambda s: F.relu(s[..., :1]) * s[..., 1:], (), Activation("relu"), "gate_up"),
    "in place": (in_place, (10,), CLAMPED, "gate_up"),
    "gelu by hand": (gelu_by_hand, (0.5, 0.79788, 0.044715, 3), Activation("gelu_tanh"), "gate_up"),
    "no gates, clamped": (lambda s: F.gelu(s.clamp(max=3)), (3,), Activation("gelu", False, 1.0, 3.0), None),
    "gates apart from ups": (lambda s: F.silu(s.chunk(2, -1)[0].clamp(max=20)) * s.chunk(2, -1)[1].clamp(-0.5, 0.5),
     (20, 0.5), Activation(gate_limit=20.0, up_limit=0.5), "gate_up"),
    "up less a number": (lambda s: F.silu(s.chunk(2, -1)[0]) * (s.chunk(2, -1)[1] - 0.7), (0.7,),
     Activation(up_offset=-0.7), "gate_up"),
    "swish by a negative number": (lambda s: s[..., ::2] / (1 + torch.exp(-1.702 * s[..., ::2])) * s[..., 1::2],
     (-1.702,), Activation(alpha=1.702), "interleaved"),
    "finite in float16": (lambda s: F.silu(s.clamp(max=65504.0)), (65504.0,),
     Activation("silu", False, 1.0, 65504.0), None),
    "numbers of no use": (qwen, (1e-6, 1e4, 1e30, float("inf"), float("nan"), 0, 128, -3), Activation(), "gate_up"),
}  # fmt: skip


@pytest.mark.parametrize("function, numbers, activation, order", MODELS.values(), ids=MODELS)
def test_it_is_recognised(function, numbers, activation, order):
    assert recognised(function, numbers, order) == (activation, order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("more", [{}, {"gate_limit": 7.0}, {"up_limit": 0.25, "up_offset": 1.0}], ids=str)
def test_every_function_in_every_order(order, function, more):
    expected = Activation(function, **more)
    assert recognised(lambda s: expected(*split(s, order)), tuple(more.values()), order) == (expected, order)


def mutated(**changes):
    """DeepSeek-V4's with one thing changed."""

    def function(sums: Tensor) -> Tensor:
        gate, up = sums.chunk(2, dim=-1)
        gate = changes.get("gate", lambda g: g.clamp(max=10.0))(gate)
        up = changes.get("up", lambda u: u.clamp(min=-10.0, max=10.0))(up)
        value = changes.get("function", F.silu)(gate)
        return changes.get("product", lambda v, u: v * u)(value, up)

    return function


REFUSED = {
    "gates clamped on both sides": mutated(gate=lambda g: g.clamp(-10.0, 10.0)),
    "ups clamped above only": mutated(up=lambda u: u.clamp(max=10.0)),
    "ups clamped above only, beyond the grid": mutated(up=lambda u: u.clamp(max=300.0)),
    "ups clamped below only, beyond the grid": mutated(up=lambda u: u.clamp(min=-300.0)),
    "ups clamped unevenly": mutated(up=lambda u: u.clamp(-5.0, 10.0)),
    "a limit that is no number of it": mutated(gate=lambda g: g.clamp(max=9.0)),
    "a soft limit": mutated(up=lambda u: 10 * torch.tanh(u / 10)),
    "clamped after silu": mutated(gate=lambda g: g, function=lambda g: F.silu(g).clamp(max=10.0)),
    "clamped product": mutated(product=lambda v, u: (v * u).clamp(-50, 50)),
    "clamped product, far out": mutated(product=lambda v, u: (v * u).clamp(max=99)),
    "a factor": mutated(product=lambda v, u: v * u * 1.5),
    "a small factor": mutated(product=lambda v, u: v * u * 1.0001), "a minus": mutated(product=lambda v, u: -v * u),
    "a bias before": mutated(gate=lambda g: (g + 0.01).clamp(max=10.0)),
    "a bias after": mutated(product=lambda v, u: v * u + 1e-3), "a sum": mutated(product=torch.add),
    "sigmoid": mutated(function=torch.sigmoid), "tanh": mutated(function=torch.tanh),
    "leaky relu": mutated(function=F.leaky_relu), "elu": mutated(function=F.elu), "mish": mutated(function=F.mish),
    "hard swish": mutated(function=F.hardswish), "relu6": mutated(function=F.relu6),
    "relu cubed": mutated(function=lambda g: F.relu(g) ** 3),
    "silu of silu": mutated(function=lambda g: F.silu(F.silu(g))),
    "another alpha": mutated(function=lambda g: g * torch.sigmoid(1.1 * g)),
    "rounded to bfloat16": mutated(product=lambda v, u: (v * u).bfloat16()),
    "no gate at all": mutated(function=lambda g: g),
    "NaN": mutated(product=lambda v, u: torch.where(v > 9, torch.nan, v * u)),
    "noise": mutated(product=lambda v, u: v * u * (1 + 1e-4 * torch.rand_like(v))),
}  # fmt: skip


@pytest.mark.parametrize("function", REFUSED.values(), ids=REFUSED)
def test_one_thing_changed_is_refused(function):
    assert recognised(mutated(), (10.0, 1.702, 300.0)) == (CLAMPED, "gate_up")
    found = recognised(function, (10.0, 1.702, 300.0))
    assert isinstance(found, Rejected)
    assert "the nearest is" in found.detail and "expected" in found.detail and "found" in found.detail


def test_a_refusal_names_the_nearest_and_the_smallest_sums_that_differ():
    found = recognised(lambda s: F.silu(s.chunk(2, -1)[0].clamp(max=7)) * s.chunk(2, -1)[1], (9.0,))
    assert found.why == "what stands between the two products is no activation of the op"
    nearest, rest = found.detail.split(": at gate ")
    assert nearest == "the nearest is silu(gate) * up"
    gate, told = rest.split(", up ")
    assert 7 < float(gate) <= 9
    up, told = told.split(": ")
    numbers = [float(part.split()[-1]) for part in told.split(", ")]
    expected, clamped = (F.silu(torch.tensor(z)).item() * float(up) for z in (float(gate), 7.0))
    assert numbers == pytest.approx([expected, clamped], rel=1e-5)


def test_it_is_run_in_float32_without_gradients_and_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    assert recognised(watched, (10.0,))[0] == Activation(gate_limit=10.0)
    assert torch.equal(torch.get_rng_state(), state)
