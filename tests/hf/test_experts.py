"""Packed experts in the place of those of real classes of transformers: tiny models with random weights."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from marlin_w4a16 import FP4Weight, PackedExperts, quantize_nvfp4
from marlin_w4a16.hf import pack_experts_of
from marlin_w4a16.hf.experts import implementation as plugin
from marlin_w4a16.passes.outcome import Rejected
from mixtures.experts import stacked
from mixtures.models import COMMON, FAMILIES, Family
from narrow import case

IDS = torch.arange(1, 19).view(2, 9)
SAME = [family for family in FAMILIES if family.name != "Llama4"]  # its experts have no router's arguments
FEW = [case(f, narrow=f.name in ("Qwen3Moe", "GptOss")) for f in SAME]
every_family = pytest.mark.parametrize("family", SAME, ids=str)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "_apply_gate")}


def weights_of(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj


@torch.no_grad()
def models(family: Family, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A model whose experts are dense, exactly decoded from FP4, and the same with packed ones in their place."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family.name}Config")(**COMMON | family.settings)
    dense = getattr(transformers, f"{family.name}ForCausalLM")(config).eval()
    dense.set_experts_implementation("grouped_mm")
    packed = copy.deepcopy(dense)
    for path, module in experts_of(dense).items():
        found = []
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1.0 if name.endswith("bias") else 0.2))
        for parameter in weights_of(module):
            weight = stacked(parameter.transpose(1, 2) if module.is_transposed else parameter, family.quantize)
            exact = weight.decode(torch.float32)
            parameter.copy_(exact.transpose(1, 2) if module.is_transposed else exact)
            found.append(weight)
        made = pack_experts_of(module, *found, dtype)
        assert isinstance(made, PackedExperts), made
        packed.set_submodule(path, made)
    for model in (dense, packed):
        torch.manual_seed(seed + 1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape))
    return dense.to(dtype), packed.to(dtype)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


def assert_close(found: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    assert found.shape == expected.shape and expected.norm() > 0
    assert (found.double() - expected.double()).norm() <= limit * expected.double().norm()


@every_family
def test_logits_are_those_of_the_exactly_decoded_model(family):
    dense, packed = models(family)
    modules = experts_of(dense)
    assert not experts_of(packed) and len(modules) == family.mixtures
    for path in modules:
        assert str(packed.get_submodule(path).activation) == family.activation
    with torch.no_grad():
        expected = logits(dense)
        assert_close(logits(packed), expected)
        for path in modules:  # what the router chose decides them
            packed.get_submodule(path).multiplier2.mul_(2)
        assert (logits(packed) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(
    "family, backend",
    [
        case(family, backend, narrow=family.name in narrow)
        for backend, narrow in (("aot_eager", ("Qwen3Moe", "NemotronH")), ("marlin_w4a16", ()))
        for family in SAME
    ],
    ids=str,
)
def test_they_compile_in_one_graph(family, backend):
    dense, packed = models(family)
    compiled = torch.compile(logits, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(packed), logits(dense))


@every_family
def test_gradients_go_through_them_to_the_router(family):
    dense, packed = models(family)
    for model in (dense, packed):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and ".experts." not in name)
        logits(model).square().mean().backward()
    found, expected = (dict(model.named_parameters()) for model in (packed, dense))
    routers = [name for name in expected if any(part in name for part in ("gate.weight", "router.weight"))]
    assert routers
    for name, parameter in expected.items():
        if parameter.grad is not None:
            assert (found[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-9, name
    assert any(expected[name].grad.abs().sum() > 0 for name in routers)


@pytest.mark.parametrize("family", FEW, ids=str)
def test_a_state_goes_into_a_second_instance_and_copies_stand_alone(family, as_traced):
    dense, first = models(family)
    other_dense, second = models(family, seed=7)
    compiled = torch.compile(logits, backend="marlin_w4a16", fullgraph=True)
    with torch.no_grad():
        for model, expected in ((first, dense), (second, other_dense), (copy.deepcopy(first), dense)):
            assert_close(compiled(model), logits(expected))
        second.load_state_dict(first.state_dict())
        assert_close(compiled(second), logits(dense))


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_sixteen_bits(family, dtype):
    exact, _ = models(family)
    _, packed = models(family, dtype=dtype)
    with torch.no_grad():
        assert_close(logits(packed), logits(exact).to(dtype), 0.2)  # which experts a token chooses may differ
        assert logits(packed).isfinite().all()


# The experts implementation.


def stays(family: Family) -> tuple[nn.Module, nn.Module]:
    """A dense model, and one whose own Experts modules hold packed experts and no dense weight."""
    dense, packed = models(family)
    holding = copy.deepcopy(dense)
    for path, module in experts_of(holding).items():
        for name in list(module._parameters):
            delattr(module, name)
        module.packed = packed.get_submodule(path)
    return dense, holding


@pytest.mark.parametrize("family, compiles", [*((family, False) for family in SAME), (SAME[0], True)], ids=str)
def test_the_implementation_runs_what_a_module_holds(family, compiles, as_traced):
    dense, holding = stays(family)
    holding.set_experts_implementation("marlin_w4a16")
    assert holding.config._experts_implementation == "marlin_w4a16"
    run = torch.compile(logits, backend="marlin_w4a16", fullgraph=True) if compiles else logits
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_close(run(holding), logits(dense))


@pytest.mark.parametrize("compiles", [False, True])
def test_dense_experts_run_as_grouped_mm_with_one_warning(compiles):
    dense, _ = models(SAME[0])
    with torch.no_grad():
        expected = logits(dense)
        dense.set_experts_implementation("marlin_w4a16")
        plugin._warn_once.cache_clear()
        run = torch.compile(logits, backend="aot_eager", fullgraph=True) if compiles else logits
        with pytest.warns(UserWarning) as caught:
            found = run(dense), run(dense)
    assert all(torch.equal(out, expected) for out in found)
    told = [str(w.message) for w in caught if "marlin_w4a16" in str(w.message)]
    assert told == [
        "experts_implementation='marlin_w4a16': the weights of Qwen3MoeExperts are dense: they run as 'grouped_mm' does"
    ]


def test_it_is_registered_beside_the_others():
    assert ALL_EXPERTS_FUNCTIONS["marlin_w4a16"] is plugin.experts_forward
    assert {"grouped_mm", "batched_mm"} <= set(ALL_EXPERTS_FUNCTIONS.keys())


# What is refused.


def a_module(name: str, **settings) -> nn.Module:
    model, _, experts = name.partition(".")
    config = getattr(transformers, f"{model}Config")(**COMMON | settings)
    source = __import__(f"transformers.models.{config.model_type}.modeling_{config.model_type}", fromlist=["_"])
    return getattr(source, experts)(config)


def drawn(module: nn.Module) -> list[FP4Weight]:
    with torch.no_grad():
        transposed = module.is_transposed
        return [stacked(torch.randn_like(w.transpose(1, 2) if transposed else w)) for w in weights_of(module)]


QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def test_what_the_op_does_not_compute_is_refused():
    module = a_module("Qwen3Moe.Qwen3MoeExperts", **QWEN)
    given = drawn(module)
    assert isinstance(pack_experts_of(module, *given), PackedExperts)

    def reason() -> str:
        found = pack_experts_of(module, *given)
        assert isinstance(found, Rejected)
        return found.reason

    module.act_fn = nn.Sigmoid()
    assert reason().startswith("what stands between the two products is no activation of the op: the nearest is")
    module.act_fn = nn.SiLU()
    module.has_post_expert_norm = True
    assert reason() == "it normalises what each expert gives (has_post_expert_norm)"
    module.has_post_expert_norm = False
    handle = module.register_forward_hook(lambda *_: None)
    assert reason() == "it has hooks, which a PackedExperts would lose"
    handle.remove()
    given[0] = stacked(torch.randn(4, 90, 64))
    assert reason() == "gate_up_proj: found FP4 of shape [4, 90, 64], expected [4, 96, 64]"
    given[0], given[1] = drawn(module)[0], stacked(torch.randn(4, 64, 64))
    assert reason() == "down_proj: found FP4 of shape [4, 64, 64], expected [4, 64, 48]"
    llama4 = transformers.models.llama4.modeling_llama4.Llama4TextExperts
    for no_experts in (nn.Linear(64, 96), llama4(transformers.Llama4TextConfig(**COMMON, num_local_experts=4))):
        found = pack_experts_of(no_experts, *drawn(module))
        assert f"a {type(no_experts).__name__} is no Experts module of transformers: it has no has_gate" == found.reason


def test_a_clamp_after_silu_is_refused():
    step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    module = a_module("Qwen3Moe.Qwen3MoeExperts", **QWEN)
    module.limit = 7.0
    module._apply_gate = step.Step3p7Experts._apply_gate.__get__(module)
    assert "the nearest is silu(gate) * up in +-7: at gate 7" in pack_experts_of(module, *drawn(module)).detail


def test_quick_gelu_and_limits_of_a_config_are_found():
    module = a_module("Qwen3Moe.Qwen3MoeExperts", hidden_act="quick_gelu", **QWEN)
    assert str(pack_experts_of(module, *drawn(module)).activation) == "silu(gate, 1.702) * up"
    module.config.swiglu_limit = 6
    module._apply_gate = lambda sums: sums.chunk(2, -1)[0].clamp(max=6).relu() * sums.chunk(2, -1)[1]
    assert str(pack_experts_of(module, *drawn(module)).activation) == "relu(gate <= 6) * up"


def test_a_module_without_values_is_enough():
    with torch.device("meta"):
        module = a_module("GptOss.GptOssExperts", num_local_experts=4)
    given = [stacked(torch.randn(4, 192, 64)), stacked(torch.randn(4, 64, 96))]
    module.gate_up_proj_bias = nn.Parameter(torch.randn(4, 192))
    module.down_proj_bias = nn.Parameter(torch.randn(4, 64))
    found = pack_experts_of(module, *given)
    assert found.order == "interleaved" and found.bias2 is module.down_proj_bias


def test_columns_are_filled_up_to_whole_groups():
    module = a_module("Qwen3Moe.Qwen3MoeExperts", **QWEN | {"moe_intermediate_size": 40})
    w13, w2 = stacked(torch.randn(4, 80, 64)), quantize_nvfp4(torch.randn(4 * 64, 48))
    w2 = FP4Weight(w2.codes.view(4, 64, -1), w2.scales.view(4, 64, -1), w2.multiplier.view(4, 64), "e4m3", 16)
    found = pack_experts_of(module, w13, w2)
    with torch.no_grad():
        module.gate_up_proj.copy_(w13.decode(torch.float32)), module.down_proj.copy_(w2.decode(torch.float32)[..., :40])
        x, ids, weights = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
        module.config._experts_implementation = "grouped_mm"
        assert_close(found(x, ids, weights), module(x, ids, weights))
