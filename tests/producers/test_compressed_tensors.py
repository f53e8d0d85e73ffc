"""Linears of compressed-tensors, in checkpoints of a tiny Llama that its own code quantised and compressed."""

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import PackedLinear, prepare, quantize_mxfp4, quantize_nvfp4, restore

TOKENS = torch.arange(0, 96, 12).view(1, 8)


@pytest.fixture(autouse=True)
def _loaded_by_transformers_alone(monkeypatch):
    """Without marlin_w4a16.hf, which another test of this process may have imported."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "compressed-tensors", CompressedTensorsHfQuantizer)


FORMATS = {"NVFP4A16": "NVFP4 group 16", "MXFP4A16": "MXFP4 group 32", "NVFP4": "NVFP4 group 16"}
LEFT = "model.layers.0.self_attn.q_proj"


def llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for linear in linears(model):
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    return model.to(dtype).eval()


def linears(model: nn.Module) -> list[nn.Linear]:
    dense = [m for m in model.modules() if isinstance(m, nn.Linear) and not isinstance(m, PackedLinear)]
    return [module for module in dense if module is not model.lm_head]


def quantised(model: nn.Module, scheme: str | object) -> nn.Module:
    """The model with fake quantisers, calibrated."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    scheme = preset_name_to_scheme(scheme, ["Linear"]) if isinstance(scheme, str) else scheme
    apply_quantization_config(model, QuantizationConfig(config_groups={"group": scheme}, ignore=["lm_head"]))
    for linear in model.modules():
        if hasattr(linear, "quantization_scheme"):
            calibrate(linear)
            linear.quantization_status = QuantizationStatus.FROZEN
    return model


@torch.no_grad()
def calibrate(linear: nn.Linear) -> None:
    weight, group = linear.weight.float(), linear.quantization_scheme.weights.group_size
    if group == 16:
        ours = quantize_nvfp4(weight)
        linear.weight_global_scale.fill_(float(1 / ours.multiplier[0]))
        linear.weight_scale.copy_(ours.scales.view(torch.float8_e4m3fn))
    elif group == 32:
        linear.weight_scale.copy_(quantize_mxfp4(weight).scales.view(torch.float8_e8m0fnu))
    if hasattr(linear, "input_global_scale"):
        linear.input_global_scale.fill_(100.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a compressed checkpoint, written once."""

    @functools.cache
    def written(scheme: str) -> Path:
        from compressed_tensors.compressors import ModelCompressor

        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = quantised(llama(), scheme)
        folder, compressor = tmp_path_factory.mktemp(scheme), ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return folder

    return written


@pytest.fixture(params=["NVFP4A16", "MXFP4A16"])
def scheme(request) -> str:
    return request.param


@pytest.fixture
def load(checkpoint, scheme) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(checkpoint(scheme))


@pytest.fixture
def model(load) -> nn.Module:
    return load()


@pytest.fixture
def decompressed(load) -> nn.Module:
    return ran(load())


def ran(model: nn.Module) -> nn.Module:
    """The model after its first forward, which decompresses it."""
    logits(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(TOKENS, use_cache=False).logits


def has_hook(model: nn.Module) -> bool:
    found = [hook.__name__ for hook in model._forward_pre_hooks.values()]
    assert found == ["ct_decompress_hook"] * hasattr(model, "ct_decompress_hook")
    return bool(found)


def state(model: nn.Module) -> list[tuple]:
    """Every tensor of the model in its order: where, dtype, shape, bytes."""
    found = model.state_dict().items()
    return [(k, v.dtype, v.shape, bytes(v.contiguous().flatten().view(torch.uint8).tolist())) for k, v in found]


def statuses(model: nn.Module) -> set[str]:
    return {linear.quantization_status.value for linear in linears(model)}


def refusals(swaps) -> set[str]:
    """Why linears of compressed-tensors were left."""
    return {row.refusal for row in swaps.refused if row.producer == "compressed-tensors"}


# Compressed


def test_linears_are_swapped_before_the_first_forward(load, scheme, assert_near):
    model, expected = load(), logits(load())
    assert has_hook(model)
    swaps = prepare(model)
    assert [(row.producer, row.format) for row in swaps.done] == [("compressed-tensors", FORMATS[scheme])] * 7
    assert [row.path for row in swaps.refused] == ["lm_head"]
    assert not has_hook(model) and not linears(model)
    assert_near(logits(model), expected)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 7


def test_bytes_before_are_those_of_codes_and_scales(model):
    expected = [linear.weight_packed.nbytes + linear.weight_scale.nbytes for linear in linears(model)]
    assert [row.before for row in prepare(model).done] == expected


@pytest.mark.parametrize("names, runs", [(("weight_packed", "weight_scale"), False), (("weight",), True)])
def test_the_memory_of_the_originals_is_freed(model, names, runs):
    if runs:
        logits(model)
    tensors = [linear._parameters[name] for linear in linears(model) for name in names]
    originals = [weakref.ref(t.untyped_storage()) for t in tensors]
    del tensors
    gc.collect()
    assert all(reference() for reference in originals)
    assert len(prepare(model, recover=True).done) == 7
    gc.collect()
    assert not any(reference() for reference in originals)


def test_each_weight_is_what_it_would_be_decompressed_to(model, decompressed, scheme):
    prepare(model)
    for path, linear in decompressed.named_modules():
        if isinstance(linear, nn.Linear) and linear is not decompressed.lm_head:
            decoded = model.get_submodule(path).to_fp4().decode(linear.weight.dtype)
            apart = (decoded.view(torch.int16).int() - linear.weight.view(torch.int16).int()).abs()
            assert apart.max() <= (scheme == "NVFP4A16") and (apart == 0).float().mean() > 0.9


def test_they_are_restored_with_the_hook_and_decompress_as_before(load, scheme):
    model, fresh = load(), load()
    modules = list(model.modules())
    swaps = prepare(model)
    again = restore(model)
    assert [row.before for row in swaps.done] == [row.after for row in again.done]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert state(model) == state(fresh)
    assert has_hook(model) and statuses(model) == {"compressed"}
    assert torch.equal(logits(model), logits(fresh))
    assert not has_hook(model) and statuses(model) == {"decompressed"}
    assert state(model) == state(fresh)


def test_what_is_restored_can_be_prepared_again(model, load, assert_near):
    for _ in range(2):
        assert len(prepare(model).done) == 7
        restore(model)
    assert state(model) == state(load()) and has_hook(model)


def test_weights_that_were_loaded_meanwhile_come_back(model, load):
    other = load()
    for linear in linears(other):
        linear.weight_packed.data = linear.weight_packed.flip(0)
    expected = state(other)
    prepare(other)
    prepare(model)
    model.load_state_dict(other.state_dict())
    restore(model)
    assert state(model) == expected


@pytest.mark.parametrize("scheme", ["NVFP4A16"])
def test_a_global_scale_that_was_loaded_meanwhile_comes_back(model):
    prepare(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.multiplier.div_(3)
    factor = model.model.layers[0].self_attn.q_proj.multiplier[0].clone()
    assert not refusals(restore(model))
    torch.testing.assert_close(linears(model)[0].weight_global_scale[0], 1 / factor, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("scheme", ["MXFP4A16"])
def test_a_multiplier_that_mxfp4_cannot_hold_stays_packed(model):
    prepare(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.multiplier.mul_(3)
    assert refusals(restore(model)) == {f"{LEFT}: found a multiplier of 3.0, expected 1: there is no global scale"}


def test_the_hook_comes_back_to_the_model_that_had_it(model, load):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.llm = model

    wrapper = Wrapper()
    assert len(prepare(wrapper).done) == 7 and not has_hook(model)
    restore(wrapper)
    assert has_hook(model) and not has_hook(wrapper)
    assert torch.equal(logits(model), logits(load()))


def left(model: nn.Module) -> nn.Module:
    """One of its linears cannot be swapped."""
    model.get_submodule(LEFT).register_forward_hook(lambda *args: None)
    return model


def test_the_hook_stays_while_something_is_left_to_decompress(model, load, assert_near):
    swaps = prepare(left(model))
    assert len(swaps.done) == 6 and refusals(swaps) == {"it has hooks, which a PackedLinear would lose"}
    assert has_hook(model)
    assert_near(logits(model), logits(load()))
    assert not has_hook(model) and statuses(model) == {"decompressed"}


def test_what_was_swapped_in_part_is_restored(model, load):
    prepare(left(model))
    restore(model)
    assert has_hook(model) and state(model) == state(load())
    assert torch.equal(logits(model), logits(load()))


def test_what_was_swapped_in_part_is_restored_after_a_forward(model, load):
    prepare(left(model))
    logits(model)
    assert len(restore(model).done) == 6
    assert torch.equal(logits(model), logits(load()))


def test_a_deep_copy_is_restored_by_itself(model, load):
    prepare(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    restore(copied)
    assert has_hook(copied) and not has_hook(model)
    assert state(copied) == state(load()) and torch.equal(logits(copied), logits(load()))
    restore(model)
    assert has_hook(model) and state(model) == state(load())


def test_a_copy_of_a_part_is_restored_by_itself(model, load):
    prepare(model)
    part = copy.deepcopy(model.model)
    assert len(restore(part).done) == 7
    assert not has_hook(model)
    with torch.no_grad():
        expected, found = (m(TOKENS, use_cache=False).last_hidden_state for m in (ran(load()).model, part))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale"])
def test_a_linear_without_one_of_its_tensors_is_left(model, name):
    delattr(model.get_submodule(LEFT), name)
    (reason,) = refusals(prepare(model))
    found, _, expected = reason.partition(": ")
    other = {"weight_packed": "weight_scale", "weight_scale": "weight_packed"}[name]
    assert found.startswith("a linear that is compressed holds ") and other in found and name not in found
    assert expected == "expected weight_packed and weight_scale"


def test_a_part_of_a_model_that_is_yet_to_be_decompressed_is_left(model, load):
    mlp = model.model.layers[0].mlp
    (reason,) = refusals(prepare(mlp))
    assert reason == "the hook that decompresses its model is outside of this part: prepare the whole model"
    assert torch.equal(logits(model), logits(load()))
    assert len(prepare(mlp, recover=True).done) == 3
    restore(mlp)
    assert torch.equal(logits(model), logits(load()))


def test_it_is_restored_in_parts_with_a_forward_between(model, load):
    prepare(model)
    restore(model.model.layers[0].mlp)
    logits(model)
    restore(model)
    assert torch.equal(logits(model), logits(load()))


# Decompressed


def test_a_decompressed_weight_needs_recover(decompressed):
    before = state(decompressed)
    swaps = prepare(decompressed)
    assert not swaps.done and state(decompressed) == before
    assert refusals(swaps) == {"its weight is dense (decompressed): prepare(model, recover=True) reads the codes back"}


def test_a_decompressed_weight_is_recovered_and_restored_bit_for_bit(decompressed, scheme, assert_near):
    before, modules, output = state(decompressed), list(decompressed.modules()), logits(decompressed)
    gradients = [p.requires_grad for p in decompressed.parameters()]
    biases = [linear.bias for linear in linears(decompressed)]
    swaps = prepare(decompressed, recover=True)
    assert [row.format for row in swaps.done] == [FORMATS[scheme]] * 7
    assert swaps.done[0].before == 64 * 64 * 2
    assert_near(logits(decompressed), output)
    restore(decompressed)
    assert all(a is b for a, b in zip(decompressed.modules(), modules, strict=True))
    assert state(decompressed) == before and torch.equal(logits(decompressed), output)
    assert [p.requires_grad for p in decompressed.parameters()] == gradients
    assert all(linear.bias is bias for linear, bias in zip(linears(decompressed), biases, strict=True))
    assert not has_hook(decompressed)


def test_what_is_recovered_is_what_was_compressed(model, decompressed):
    prepare(model)
    prepare(decompressed, recover=True)
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found, expected = decompressed.get_submodule(path).to_fp4(), module.to_fp4()
            assert torch.equal(found.decode(), expected.decode()) and torch.equal(found.scales, expected.scales)


def test_a_decompressed_weight_with_an_element_changed_is_refused(decompressed):
    weight = decompressed.get_submodule(LEFT).weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], weight.new_tensor(9.0))
    before = state(decompressed.get_submodule(LEFT))
    swaps = prepare(decompressed, recover=True)
    assert len(swaps.done) == 6
    assert refusals(swaps) == {
        "its dense weight is not, bit for bit, the decode of codes with the scales on the module"
    }
    assert state(decompressed.get_submodule(LEFT)) == before


def test_scales_that_the_format_does_not_have_are_refused(decompressed):
    decompressed.get_submodule(LEFT).weight_scale.data[0, 0] *= 1.01
    (reason,) = refusals(prepare(decompressed, recover=True))
    assert reason.startswith("its scales (64, ") and " of torch.bfloat16 are no FP4 scales in groups of " in reason


# Fake-quantised

CASES = [(scheme, dtype) for scheme in ("NVFP4A16", "MXFP4A16") for dtype in (torch.float32, torch.bfloat16)]


def fake(scheme: str, dtype: torch.dtype, negative_zeros: bool, cast: torch.dtype | None = None) -> nn.Module:
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    model = quantised(llama(dtype), scheme).to(cast)
    for linear in linears(model):
        small = forward_quantize(linear, linear.weight, "weight", linear.quantization_scheme.weights) == 0
        assert (small & (linear.weight < 0)).any()
        if not negative_zeros:
            linear.weight.data = torch.where(small, linear.weight.abs(), linear.weight)
    return model


@pytest.mark.parametrize("negative_zeros", [False, True])
@pytest.mark.parametrize("scheme, dtype", CASES, ids=str)
def test_a_fake_quantised_weight_is_recovered_and_comes_back_rounded(scheme, dtype, negative_zeros, assert_near):
    model = fake(scheme, dtype, negative_zeros)
    keys, modules, expected = list(model.state_dict()), list(model.modules()), logits(model)
    swaps = prepare(model, recover=True)
    assert not refusals(swaps)
    assert [row.format for row in swaps.done] == [FORMATS[scheme]] * 7
    assert_near(logits(model), expected)
    restore(model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert list(model.state_dict()) == keys and statuses(model) == {"frozen"}
    assert torch.equal(logits(model), expected)
    assert all(len(linear.weight[0, :16].abs().unique()) <= 8 for linear in linears(model))


def test_a_fake_quantised_weight_is_trained_again_when_it_is_restored():
    model = fake("MXFP4A16", torch.float32, negative_zeros=False)
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    assert gradients[f"{LEFT}.weight"]
    prepare(model, recover=True)
    restore(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients


def test_a_fake_quantiser_that_rounds_on_the_way_is_refused():
    """With a global scale in bfloat16 a block's scale over it is rounded, and its product with a code again."""
    model = fake("NVFP4A16", torch.bfloat16, negative_zeros=False, cast=torch.bfloat16)
    before = state(model)
    swaps = prepare(model, recover=True)
    assert refusals(swaps) == {
        "its dense weight is not, bit for bit, the decode of codes with the scales on the module"
    }
    assert state(model) == before


def test_a_fake_quantiser_that_changes_its_own_output_is_refused(monkeypatch):
    model = quantised(llama(), "MXFP4A16")
    forward = "compressed_tensors.quantization.lifecycle.forward.forward_quantize"
    monkeypatch.setattr(forward, lambda module, value, name, args: value / 2)
    reason = "its fake quantiser gives other values when it is run on its own output"
    assert refusals(prepare(model, recover=True)) == {reason}


def test_a_fake_quantised_weight_needs_recover():
    model = quantised(llama(), "MXFP4A16")
    reason = "its weight is dense (frozen): prepare(model, recover=True) reads the codes back"
    assert refusals(prepare(model)) == {reason}


# Refused


def refusal(model: nn.Module) -> str | None:
    """Why q_proj was left, in which case it was left as it was."""
    linear = model.get_submodule(LEFT)
    before = state(linear)
    row = next(row for row in prepare(model).rows if row.path == LEFT)
    if row.refusal is not None:
        assert row.producer == "compressed-tensors"
        assert model.get_submodule(LEFT) is linear and state(linear) == before
    return row.refusal


def test_quantised_activations_are_refused(checkpoint):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("NVFP4"))
    assert refusal(model) == (
        "its inputs are quantised to 4 bit float: prepare(model, activation_quant='drop') leaves that out"
    )
    assert has_hook(model)


@pytest.mark.parametrize("scheme", ["NVFP4"])
def test_quantised_activations_are_dropped_and_restored(load, assert_near):
    model, weights_only = load(), load()
    for linear in linears(weights_only):
        linear.quantization_scheme.input_activations = None
    assert len(prepare(model, activation_quant="drop").done) == 7
    assert_near(logits(model), logits(weights_only))
    restore(model)
    assert state(model) == state(load()) and torch.equal(logits(model), logits(load()))


def integers() -> object:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32)
    return QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize(
    "scheme, names",
    [(integers, "num_bits=4 type='int'"), (lambda: "FP8", "num_bits=8 type='float'"), (lambda: "W8A8", "num_bits=8")],
    ids=["INT4", "FP8", "INT8"],
)
def test_another_scheme_is_refused_by_its_name(scheme, names):
    reason = refusal(quantised(llama(), scheme()))
    assert reason.startswith("its scheme is not FP4: ") and names in reason


def test_quantised_outputs_are_refused(model):
    for linear in linears(model):
        linear.quantization_scheme.output_activations = linear.quantization_scheme.weights
    assert refusal(model) == "its outputs are quantised"


def test_a_quantisation_that_is_switched_off_is_refused(model):
    model.get_submodule(LEFT).quantization_enabled = False
    assert refusal(model) == "its quantisation is switched off"


def test_a_linear_that_computes_something_else_is_refused(model):
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.get_submodule(LEFT).__class__ = Doubled
    assert refusal(model) == "a Doubled computes something else than nn.Linear"


def test_an_offloaded_weight_is_refused(model):
    from compressed_tensors.offload.cache.cpu import CPUCache

    linear = model.get_submodule(LEFT)
    linear._parameters = CPUCache.from_mapping(linear._parameters, "cuda:0")
    swaps = prepare(model)
    assert refusals(swaps) == {"its weights are offloaded to cpu"} and len(swaps.done) == 6


def test_other_modules_have_no_row(model):
    model.model.embed_tokens.quantization_scheme = linears(model)[0].quantization_scheme
    assert len(prepare(model).rows) == 8


def test_a_weight_on_the_meta_device_is_left(model):
    model.get_submodule(LEFT).to("meta")
    swaps = prepare(model)
    assert refusals(swaps) == {"its weight holds no values: it is on the meta device"} and len(swaps.done) == 6
