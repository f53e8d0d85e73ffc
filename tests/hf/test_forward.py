"""Loaded models in eager mode against the dense model that the exact decode of the same files gives."""

import json

import pytest
import torch
from torch.nn.functional import linear

from checkpoints.formats import written
from hf.dense import exact, low_rank, pre_quant_scale, relative, scaled, with_low_rank
from hf.loading import choosing, linears, load, loaded, logits, prompts, reference, routed, routing, stored
from hf.matrix import BFLOAT16, FLOAT32, KEEP, ON_LLAMA, PARTLY, params
from hf.producers import quantised_input
from marlin_w4a16.hf import CheckpointError

FP8_INPUTS = ["modelopt-w4a8-nvfp4", "modelopt-w4a8-mxfp4", "ct-mxfp4-fp8"]


@pytest.mark.parametrize("name, family", params(FLOAT32.cases))
def test_logits_and_tokens_in_float32(name, family):
    found, expected = (logits(of(name, family, torch.float32)) for of in (loaded, reference))
    assert relative(found, expected) <= 1e-5 and torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name, family", [case for case in ON_LLAMA if case[0] != "ct-nvfp4-fp8"])
def test_logits_in_float16(name, family):
    truth = logits(reference(name, family, torch.float32))
    found, plain = (logits(of(name, family, torch.float16)) for of in (loaded, reference))
    assert found.dtype == torch.float16
    assert relative(found, truth) <= 1.02 * relative(plain, truth) and relative(found, plain) <= 2e-3


@pytest.mark.parametrize("name, family", params(BFLOAT16.cases, PARTLY))
def test_teacher_forced_steps_in_bfloat16(name, family):
    truth = logits(reference(name, family, torch.float32))
    found, plain = (of(name, family, torch.bfloat16) for of in (loaded, reference))
    with routed(found, routing(name, family)), routed(plain, routing(name, family)):
        found, plain = logits(found), logits(plain)
    assert relative(found, truth) <= 1.02 * relative(plain, truth) and relative(found, plain) <= 1.5e-2
    error = (found - truth).abs().amax(-1).mean()  # the largest of a step, of all steps the mean
    best = truth.topk(2).values
    compared, equal = best[..., 0] - best[..., 1] > 4 * error, found.argmax(-1) == truth.argmax(-1)
    print(f"{name} {family}: {compared.sum()} of {compared.numel()} steps compared, {(~compared).sum()} excused, of "
          f"which {(~equal).sum()} differ; logits are off by {error:.3f}")  # fmt: skip
    assert equal[compared].all()
    least = 0.35 if name == "ct-nvfp4-fp8" else 0.7  # inputs in FP8 jump where they are rounded
    assert compared.numel() == 8 * 32 and compared.sum() >= least * 8 * 32 and equal.float().mean() >= 0.95


@pytest.mark.parametrize("name, family", params(KEEP.cases))
def test_kept_inputs_are_the_producers(name, family):
    model = load(name, family, dtype=torch.float32, quantization_config=choosing(name, activation_quant="keep"))
    tensors, config = stored(name, family), json.loads((written(name, family) / "config.json").read_text())
    passed = {}
    for path in linears(name, family):
        model.get_submodule(path).register_forward_hook(lambda m, x, y, path=path: passed.update({path: (x[0], y)}))
    kept, changed = logits(model), 0
    for path, (x, y) in passed.items():
        inputs = quantised_input(x, tensors, path, config["quantization_config"])
        changed += not torch.equal(inputs, x)
        expected = linear(inputs, exact(tensors, path).float(), tensors.get(f"{path}.bias"))
        if pair := low_rank(tensors, path):  # its input is not quantised
            expected = with_low_rank(None, (scaled(x, pre_quant_scale(tensors, path)),), expected, pair)
        assert relative(y, expected) <= 1e-5, path
    assert changed and relative(kept, logits(loaded(name, family, torch.float32))) > 1e-3


@pytest.mark.parametrize(
    "name", ["modelopt-nvfp4", "modelopt-mixed", "modelopt-awq", "modelopt-mxfp4", "ct-nvfp4", "ct-mxfp4"]
)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_kept_inputs_of_any_size(name, size):
    """Beyond what was seen in calibration, too."""
    model = load(name, dtype=torch.float32, quantization_config=choosing(name, activation_quant="keep"))
    tensors, config = stored(name), json.loads((written(name, "llama") / "config.json").read_text())
    x = size * torch.randn(7, 96)
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"):
        inputs = quantised_input(x, tensors, path, config["quantization_config"])
        with torch.no_grad():
            assert relative(model.get_submodule(path)(x), linear(inputs, exact(tensors, path).float())) <= 1e-5


@pytest.mark.parametrize("name", FP8_INPUTS)
def test_inputs_in_fp8_beside_fp4_weights_cannot_be_kept(name):
    for policy in ("keep", "refuse"):
        with pytest.raises(CheckpointError, match=f"activation_quant='{policy}', expected 'drop'"):
            load(name, quantization_config=choosing(name, activation_quant=policy))


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4", "ct-mxfp4", "ct-two-groups"])
def test_quantised_inputs_can_be_refused(name):
    with pytest.raises(CheckpointError, match=r"W4A4.*activation_quant='refuse', expected 'drop' or 'keep'"):
        load(name, quantization_config=choosing(name, activation_quant="refuse"))


@pytest.mark.parametrize("name", ["modelopt-w4a16", "ct-mxfp4a16"])
def test_there_is_nothing_to_refuse_where_inputs_are_not_quantised(name):
    for policy in ("keep", "refuse"):
        model = load(name, quantization_config=choosing(name, activation_quant=policy))
        assert torch.equal(logits(model), logits(loaded(name, "llama", torch.bfloat16)))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 5), (2, 0)])
def test_inputs_of_any_shape(shape):
    packed, plain = (
        of("modelopt-awq", "llama", torch.float32).model.layers[0].self_attn.o_proj for of in (loaded, reference)
    )
    x = torch.randn(*shape, 96)
    with torch.no_grad():
        assert packed(x).shape == (*shape, 96) and torch.allclose(packed(x), plain(x), rtol=1e-4, atol=1e-5)


def test_positions_do_not_depend_on_the_batch():
    model = loaded("ct-nvfp4a16", "llama", torch.float32)
    assert relative(logits(model, prompts()[3:4]), logits(model)[3:4]) <= 1e-6
