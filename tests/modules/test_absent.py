"""The weights of packed modules as other code sees them: dtype and device, and an error that says what to do."""

import copy
import pickle

import pytest
import torch
from torch import nn

from marlin_w4a16 import PackedLinear, quantize_nvfp4
from marlin_w4a16.modules.absent import AbsentWeight
from marlin_w4a16.modules.packed_experts import PackedExperts

EXPECTED = r"PackedLinear.weight: found a packed weight, expected a dense one for '{}': .* by model.dequantize\(\)"


@pytest.fixture
def linear() -> PackedLinear:
    return PackedLinear(quantize_nvfp4(torch.randn(64, 96)), torch.zeros(64), torch.float32)


def test_what_code_asks_of_a_weight_to_cast_its_inputs(linear):
    weight, plain = linear.weight, linear._parameters["weight"]
    assert type(weight) is AbsentWeight and isinstance(weight, nn.Parameter) and type(plain) is nn.Parameter
    assert (weight.dtype, weight.device, weight.shape, weight.numel()) == (torch.float32, plain.device, (0, 0), 0)
    x = torch.ones(2, 96, dtype=torch.float64)
    assert x.to(weight).dtype == x.to(weight.dtype).dtype == torch.float32 and weight.is_floating_point()
    assert type(weight.to("cpu")) is torch.Tensor or type(weight.to("cpu")) is nn.Parameter
    assert dict(linear.named_parameters())["weight"] is plain and "Parameter containing" in repr(weight)


def test_what_is_set_on_it_is_set_on_the_parameter(linear):
    linear.weight.requires_grad_(True)
    assert linear._parameters["weight"].requires_grad and linear.weight.requires_grad
    linear.weight.requires_grad = False
    linear._parameters["weight"].mark = 3
    assert not linear._parameters["weight"].requires_grad and linear.weight.mark == 3


WANTS = {
    "add": lambda w: w + torch.ones(64, 96),
    "data": lambda w: w.data,
    "linear": lambda w: nn.functional.linear(torch.ones(2, 96), w),
    "matmul": lambda w: torch.ones(2, 96) @ w.T,
    "normal_": lambda w: nn.init.normal_(w),
    "linalg_norm": lambda w: torch.linalg.norm(w, dim=1),
}


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
def test_what_wants_the_weight_is_told_what_to_do(linear, want):
    before = linear(torch.ones(2, 96))
    with pytest.raises(ValueError, match=EXPECTED.format(r"\w+")):
        want(linear.weight)
    assert torch.equal(linear(torch.ones(2, 96)), before)


def test_code_that_is_compiled_reads_its_dtype_in_one_graph(linear):
    def run(x):
        return linear(x.to(linear.weight.dtype))

    x = torch.ones(2, 96, dtype=torch.float64)
    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy])
def test_copies(linear, again):
    made = again(linear)
    assert type(made.weight) is AbsentWeight and type(made._parameters["weight"]) is nn.Parameter
    assert copy.deepcopy(linear.weight).shape == (0, 0)


def test_one_that_is_to_be_trained_is_told_that_it_is_not(linear):
    linear.requires_grad_(True)
    with pytest.warns(UserWarning, match="PackedLinear.weight: found a packed weight that requires a gradient"):
        linear(torch.ones(2, 96))


def test_experts_have_one_for_each_product_and_none_of_another_name():
    names = [name for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(PackedExperts, name)]
    assert names == ["gate_up_proj", "up_proj", "down_proj"]
