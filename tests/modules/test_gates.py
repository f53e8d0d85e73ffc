"""The activation of a module's experts, told by running its gate: right, or refused with what differs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.modules.gates import recognise_gate
from marlin_w4a16.passes.outcome import Rejected
from mixtures.activations import CLAMPED, GPT_OSS, deepseek_v4, gpt_oss, qwen, watched

ROWS = 24


@pytest.mark.parametrize("rows", [2, 4, 200, 5760])
def test_any_number_of_rows(rows):
    assert recognise_gate(gpt_oss, rows, (1.702, 7.0))[0] == GPT_OSS
    assert recognise_gate(deepseek_v4, rows, (10.0,)) == (CLAMPED, "gate_up")
    assert recognise_gate(lambda s: F.relu(s) ** 2, rows - 1, ()) == (Activation("relu2", False), None)


def of_one_column(sums: Tensor) -> Tensor:
    out = deepseek_v4(sums)
    return torch.cat((out[:, :7], out[:, 7:8] + 0.01, out[:, 8:]), -1)


def another_limit_in_one_column(sums: Tensor) -> Tensor:
    limit = torch.full((ROWS // 2,), 10.0)
    limit[3] = 20
    gate, up = sums.chunk(2, dim=-1)
    return F.silu(torch.minimum(gate, limit)) * up.clamp(-10, 10)


@pytest.mark.parametrize("function", [of_one_column, another_limit_in_one_column])
def test_a_column_that_is_not_like_the_others_is_refused(function):
    found = recognise_gate(function, ROWS, (10.0, 20.0))
    assert isinstance(found, Rejected) and ("as the others are" in found.detail or "the nearest is" in found.detail)


MIXED = {
    "pairs crossed": lambda s: F.silu(s[:, :12]) * s[:, 12:].flip(-1),
    "pairs of two": lambda s: torch.cat((qwen(s[:, :12]), qwen(s[:, 12:])), -1),
    "normalised": lambda s: F.softmax(s[:, :12], -1) * s[:, 12:], "gates only": lambda s: F.silu(s[:, :12]),
    "zeros": lambda s: torch.zeros_like(s[:, :12]), "reversed": lambda s: F.relu(s).flip(-1),
    "one sum for all": lambda s: F.relu(s[:, :1]) + F.relu(s),
}  # fmt: skip


@pytest.mark.parametrize("function", MIXED.values(), ids=MIXED)
def test_other_pairs_are_refused(function):
    assert "does not depend on the sums" in recognise_gate(function, ROWS, ()).detail


NO_FUNCTIONS = {
    "raises": (lambda s: s[:, :99] * torch.ones(3, 99), "cannot be run alone: RuntimeError"),
    "another width": (lambda s: s[:, :5], "it makes [11, 5] of sums of shape [11, 24]"),
    "no tensor": (lambda s: (s, s), "it makes tuple of sums"),
    "summed": (lambda s: s.sum(), "it makes [] of sums"),
}


@pytest.mark.parametrize("function, reason", NO_FUNCTIONS.values(), ids=NO_FUNCTIONS)
def test_what_is_no_such_function_is_refused(function, reason):
    assert reason in recognise_gate(function, ROWS, ()).reason


def test_it_is_run_in_float32_without_gradients_and_leaves_random_numbers_alone():
    state = torch.get_rng_state()
    assert recognise_gate(watched, ROWS, (10.0,))[0] == Activation(gate_limit=10.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_gates_of_transformers():
    moe = pytest.importorskip("transformers.integrations.moe")
    from transformers.activations import ACT2FN
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    def gate(function, **attributes):
        self = SimpleNamespace(**attributes)
        numbers = [value for value in attributes.values() if isinstance(value, float)]
        return recognise_gate(lambda sums: function(self, sums), ROWS, numbers)

    assert gate(GptOssExperts._apply_gate, alpha=1.702, limit=7.0) == (GPT_OSS, "interleaved")
    assert gate(DeepseekV4Experts._apply_gate, act_fn=ACT2FN["silu"], limit=10.0) == (CLAMPED, "gate_up")
    for name, function in (("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")):
        assert gate(moe._default_apply_gate, act_fn=ACT2FN[name]) == (Activation(function), "gate_up")
    assert gate(moe._default_apply_gate, act_fn=ACT2FN["quick_gelu"], x=1.702) == (Activation(alpha=1.702), "gate_up")
    assert isinstance(gate(Step3p7Experts._apply_gate, act_fn=ACT2FN["silu"], limit=7.0), Rejected)
