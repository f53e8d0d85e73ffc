"""The module that owns the packed weights of a mixture of experts."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import Activation, FP4Weight, PackedExperts, explain
from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.passes import outcome
from mixtures.oracle import ACTIVATIONS, Mixture, draw_mixture, draw_routing
from modules.state import addresses, assert_same, bits
from narrow import wide
from weights import equal

HIDDEN, EXPERTS = 64, 4
KEYS = ["multiplier13", "multiplier2", "words13", "scales13", "words2", "scales2"]


def module_of(mixture: Mixture, **more) -> PackedExperts:
    biases = [None if b is None else b.float() for b in (mixture.bias13, mixture.bias2)]
    more = {"weight_on_input": mixture.weight_on_input} | more
    return PackedExperts(mixture.w13, mixture.w2, mixture.activation, mixture.order, *biases, **more)


@pytest.fixture(params=["Qwen3", "gpt-oss", "NemotronH", "gelu, up first"])
def mixture(request) -> Mixture:
    formats = ("nvfp4", "mxfp4") if request.param == "gpt-oss" else ("nvfp4", "nvfp4")
    return draw_mixture(name=request.param, intermediate=100, formats=formats, biases=request.param != "Qwen3")


def inputs(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers orders them."""
    weights, ids = draw_routing(tokens, 2, EXPERTS)
    return torch.randn(tokens, HIDDEN), ids, weights


def assert_right(module: nn.Module, mixture: Mixture, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    exact = mixture.exact(x, weights, ids)
    assert (module(x, ids, weights).double() - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_it_is_the_mixture_of_the_exact_decodes(name, weight_on_input):
    mixture = draw_mixture(name=name, biases=True, weight_on_input=weight_on_input)
    assert_right(module_of(mixture), mixture, *inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0, 3)], ids=str)
def test_any_leading_shape_and_dtype(mixture, dtype, lead):
    x, ids, weights = inputs(int(torch.tensor(lead).prod()))
    out = module_of(mixture)(x.view(*lead, HIDDEN).to(dtype), ids.view(*lead, 2), weights.view(*lead, 2))
    assert out.shape == (*lead, HIDDEN) and out.dtype == dtype
    exact = mixture.exact(x.to(dtype), weights, ids).view(*lead, HIDDEN)
    assert (out.double() - exact).norm() <= 4e-3 * exact.norm()


def test_the_sentinel_of_expert_parallelism_contributes_nothing(mixture):
    x, _, weights = inputs(3)
    ids, module = torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [1, 3]]), module_of(mixture)
    assert_right(module, mixture, x, ids, weights)
    assert torch.equal(module(x, ids, weights)[1], torch.zeros(HIDDEN))


def test_both_weights_come_back_bit_for_bit(mixture):
    w13, w2 = module_of(mixture).to_fp4("layers.0.experts")
    assert equal(w13, mixture.w13) and equal(w2, mixture.w2)
    assert (w13.name, w2.name) == ("layers.0.experts.w13", "layers.0.experts.w2")


def test_what_float16_needed_shifted_decodes_to_the_same_values():
    mixture = draw_mixture(formats=("mxfp4", "mxfp4"))
    scales = mixture.w13.scales.clone()
    scales[1, 3] += 60
    far = replace(mixture.w13, scales=scales)
    module = module_of(replace(mixture, w13=far))
    assert not torch.equal(module.to_fp4()[0].scales, scales)
    assert torch.equal(module.to_fp4()[0].decode(), far.decode())
    module(torch.randn(3, HIDDEN).half(), torch.zeros(3, 1).long(), torch.ones(3, 1))


def test_trained_biases_stay_trained(mixture):
    bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))
    module = PackedExperts(mixture.w13, mixture.w2, mixture.activation, mixture.order, None, bias)
    assert module.bias2 is bias and module.bias13 is None
    first = nn.Parameter(torch.randn(mixture.w13.multiplier.shape))
    module = PackedExperts(mixture.w13, mixture.w2, mixture.activation, mixture.order, first)
    assert module.bias13.requires_grad and module.bias13.is_leaf


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_a_cast_leaves_the_weights_and_takes_the_biases(mixture, cast):
    module = module_of(mixture)
    before = bits(module)
    cast(module)
    assert_same({k: module.state_dict()[k] for k in KEYS}, {k: before[k] for k in KEYS})
    if mixture.bias13 is not None:
        assert module.bias13.dtype == module.bias2.dtype != torch.float32


def test_a_deep_copy_has_its_own_tensors(mixture):
    module = module_of(mixture)
    other = copy.deepcopy(module)
    assert_same(bits(other), bits(module))
    assert not set(addresses(other)) & set(addresses(module))
    assert_right(other, mixture, *inputs())


def test_it_goes_through_a_file_and_into_another_instance(mixture, tmp_path):
    module = module_of(mixture)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = replace(mixture, w13=shuffled(mixture.w13), w2=shuffled(mixture.w2))
    loaded = module_of(other)
    before = addresses(loaded)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert addresses(loaded) == before
    assert_same(bits(loaded), bits(module))
    assert_right(loaded, mixture, *inputs())


def shuffled(weight: FP4Weight) -> FP4Weight:
    return replace(weight, codes=weight.codes.flip(-1))


def test_the_state_says_how_it_is_packed():
    module = module_of(draw_mixture(name="gpt-oss", formats=("nvfp4", "mxfp4"), intermediate=100))
    assert json.loads(bytes(module.state_dict()["_extra_state"].tolist())) == {
        "experts": 4,
        "intermediate": 100,
        "activation": {
            "function": "silu",
            "gated": True,
            "alpha": 1.702,
            "gate_limit": 1.5,
            "up_limit": 1.0,
            "up_offset": 1.0,
        },
        "order": "interleaved",
        "weight_on_input": False,
        "w13": {"n": 256, "k": 64, "kind": "e4m3", "group": 16, "layout": "tile64"},
        "w2": {"n": 64, "k": 128, "kind": "e8m0", "group": 32, "layout": "tile64"},
    }


OTHERS = {
    "activation": lambda: module_of(draw_mixture(name="DeepSeek-V4")),
    "order": lambda: module_of(replace(draw_mixture(), order="up_gate")),
    "intermediate": lambda: module_of(draw_mixture(intermediate=90)),
    "format of w2": lambda: module_of(draw_mixture(formats=("nvfp4", "mxfp4"))),
    "experts": lambda: module_of(draw_mixture(5)),
    "where the weight goes": lambda: module_of(draw_mixture(weight_on_input=True)),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_state_of_other_experts_is_refused_and_nothing_is_overwritten(other, strict):
    model = nn.ModuleDict({"experts": module_of(draw_mixture())})
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"experts: found a weight packed as .* expected .*to_fp4\(\)"):
        model.load_state_dict(nn.ModuleDict({"experts": other()}).state_dict(), strict=strict)
    assert_same(bits(model), before)


@pytest.mark.parametrize("backend", ["aot_eager", wide("inductor"), "marlin_w4a16"])
def test_it_compiles_as_one_graph_for_any_number_of_tokens(mixture, backend):
    module = module_of(mixture)
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 3, 64):
        given = inputs(tokens)
        torch.testing.assert_close(compiled(*given), module(*given), rtol=1e-6, atol=1e-6)


def test_what_is_loaded_in_place_is_what_the_compiled_module_runs(mixture):
    module, given = module_of(mixture), inputs()
    other = module_of(replace(mixture, w13=shuffled(mixture.w13)))
    compiled = torch.compile(module, backend="marlin_w4a16", fullgraph=True)
    before = compiled(*given)
    module.load_state_dict(other.state_dict())
    assert torch.equal(compiled(*given), other(*given)) and not torch.equal(before, other(*given))


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_reach_the_input_the_router_and_the_biases(compiled):
    mixture = draw_mixture(name="gpt-oss", biases=True)
    biases = [nn.Parameter(b.float()) for b in (mixture.bias13, mixture.bias2)]
    module = PackedExperts(mixture.w13, mixture.w2, mixture.activation, mixture.order, *biases)
    run = torch.compile(module, backend="marlin_w4a16", fullgraph=True) if compiled else module
    x, ids, weights = inputs()
    x.requires_grad_(), weights.requires_grad_()
    run(x, ids, weights).square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, weights, *biases)]
    replace(mixture, bias13=leaves[2], bias2=leaves[3]).exact(*leaves[:2], ids).square().sum().backward()
    rows = module.bias13.grad  # in packed order: as many values
    assert torch.allclose(rows.double().norm(), leaves[2].grad.norm(), rtol=1e-5)
    for found, expected in zip((x, weights, module.bias2), (leaves[0], leaves[1], leaves[3]), strict=True):
        assert (found.grad.double() - expected.grad).norm() <= 1e-5 * expected.grad.norm()


@pytest.mark.parametrize(
    "name, formats, text",
    [
        (
            "gpt-oss",
            ("nvfp4", "mxfp4"),
            "PackedExperts(experts=4, hidden=64, intermediate=96, bias=False, silu(gate <= 1.5, 1.702) * "
            "(up in +-1 + 1), NVFP4 group 16 and MXFP4 group 32, ",
        ),
        (
            "NemotronH",
            ("mxfp4", "mxfp4"),
            "PackedExperts(experts=4, hidden=64, intermediate=96, bias=False, relu2(z), MXFP4 group 32, ",
        ),
    ],
)
def test_its_repr(name, formats, text):
    assert repr(module_of(draw_mixture(name=name, formats=formats))).startswith(text)


def test_they_are_explained_with_every_number_of_the_activation():
    activation = Activation("silu", True, 1.5, 2.5, 3.5, 4.5)
    mixture = replace(draw_mixture(biases=True, weight_on_input=True), activation=activation)
    rows = explain(module_of(mixture), *inputs()).owned
    assert [row.shape for row in rows] == [(w.codes.shape[0], w.n, w.k) for w in (mixture.w13, mixture.w2)]
    assert [row.experts for row in rows] == [outcome.Mixture(EXPERTS, 2, str(activation))] * 2


def test_an_order_may_be_given_and_held_as_its_string():
    mixture, (x, ids, weights) = draw_mixture(), inputs()
    module = module_of(mixture)
    assert module.order is Order.GATE_UP and b'"order": "gate_up"' in bytes(module.get_extra_state().tolist())
    module.order = "gate_up"  # as a module that was pickled with a string has it
    again = copy.deepcopy(module)
    assert all(map(equal, again.to_fp4(), (mixture.w13, mixture.w2)))
    assert_right(again, mixture, x, ids, weights)
    again.load_state_dict(module_of(mixture).state_dict())


def test_what_does_not_belong_together_is_refused():
    m = draw_mixture()

    def refused(message: str, w13=m.w13, w2=m.w2, activation=m.activation, order=m.order, **more) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            PackedExperts(w13, w2, activation, order, **more)

    refused("PackedExperts: order: found None, expected an order of gates and ups for silu(gate) * up", order=None)
    refused("order: found 'gate_up', expected None for relu2(z)", activation=Activation("relu2", False))
    refused("order: found 'gate-up', expected one of ('gate_up', 'up_gate', ", order="gate-up")
    refused("bias13: found shape [4, 96], expected [4, 192]", bias13=torch.ones(4, 96))
    refused("bias2: found shape [64], expected [4, 64]", bias2=torch.ones(64))
    refused("expected [experts, 2 i] for a second product of 256 columns", w2=draw_mixture(intermediate=256).w2)
    refused("expected one matrix of each for every expert", w2=draw_mixture(3).w2)
    wide = draw_mixture(formats=("mxfp4", "mxfp4"))
    scales = wide.w13.scales.clone()
    scales[..., 0] -= 60
    refused(
        "expected a span of at most 36 for torch.float16", w13=replace(wide.w13, scales=scales), dtype=torch.float16
    )
