"""dequantize=True and dequantize(): plain linears with the exact weight, rounded once."""

import pytest
import torch
from torch import nn

from checkpoints.names import renamed
from hf import loading
from hf.dense import codes_of, exact, low_rank, pre_quant_scale, relative, rounded, tensors_of
from hf.loading import DTYPES, choosing, experts_of, load, loaded, logits, model_type, read, reference, same, stored
from hf.matrix import DENSE, FEW_ON_LLAMA, ON_LLAMA, PARTLY, params
from marlin_w4a16.hf import report

UPSTREAM = "ct-nvfp4-fp8"  # whose FP8 layers transformers dequantises


def expect_dense(model, name, family, dtype):
    """Plain linears that hold the exact weights, with low-rank parts and pre-quant scales, and plain experts."""
    tensors = stored(name, family)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {type(m).__name__ for m in linears.values()} - {"DeepseekV4GroupedLinear"} == {"Linear"}
    assert model.dtype == dtype
    assert not any("hook" in key and value for m in linears.values() for key, value in vars(m).items())
    files = {renamed(path, model_type(name, family)): path for path in codes_of(tensors)}
    for path in loading.linears(name, family):
        weight, columns = exact(tensors, files[path]), pre_quant_scale(tensors, files[path])
        if pair := low_rank(tensors, files[path]):
            weight = weight + pair[1].double() @ pair[0].double()
        weight, found = weight if columns is None else weight * columns.double(), linears[path].weight
        if name == UPSTREAM and "self_attn" in path:  # computed in bfloat16
            assert relative(found.detach(), weight) <= 3e-3
        else:
            assert same(found.detach(), rounded(weight, dtype)) and found.requires_grad, path
        if (bias := tensors.get(f"{files[path]}.bias")) is not None:
            assert same(linears[path].bias.detach(), bias.to(dtype))
    plain = reference(name, family, dtype)
    for path, module in experts_of(model).items():
        expected = plain.get_submodule(path)
        assert type(module) is type(expected) and module.state_dict().keys() == expected.state_dict().keys()
        for leaf, parameter in expected.named_parameters():
            found = module.get_parameter(leaf)
            assert same(found.detach(), parameter.detach().contiguous()) and found.requires_grad, (path, leaf)
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("name, family", params(DENSE.cases))
def test_at_loading(name, family):
    model, info = load(name, family, output_loading_info=True, quantization_config=choosing(name, dequantize=True))
    assert not any(info.values()) and report(model) is None
    expect_dense(model, name, family, torch.bfloat16)


@pytest.mark.parametrize("name, family", params(DENSE.cases, PARTLY))
def test_afterwards(name, family):
    model = load(name, family)
    assert model.dequantize() is model
    expect_dense(model, name, family, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name, family", params(ON_LLAMA, FEW_ON_LLAMA))
def test_other_dtypes(name, family, dtype):
    expect_dense(load(name, dtype=dtype, quantization_config=choosing(name, dequantize=True)), name, family, dtype)
    expect_dense(load(name, dtype=dtype).dequantize(), name, family, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, "float16"])
@pytest.mark.parametrize(
    "name, family",
    [
        *((name, "llama") for name in ("modelopt-mixed", "modelopt-awq", "ct-nvfp4-mxfp4")),
        ("modelopt-w4a16", "qwen3moe"),
        ("gpt-oss", "gptoss"),
    ],
)
def test_into_another_dtype(name, family, dtype):
    model = load(name, family).dequantize(dtype=dtype)
    if name != "modelopt-mixed":  # its FP8 layers were rounded to bfloat16 when they were loaded
        expect_dense(model, name, family, torch.float32 if dtype != "float16" else torch.float16)
    assert {p.dtype for p in model.parameters()} == {model.dtype} == {logits(model).dtype}


@pytest.mark.parametrize("name", ["modelopt-mixed", "modelopt-awq", "ct-nvfp4", UPSTREAM])
def test_a_model_that_ran_and_was_saved(name, tmp_path):
    model = load(name)
    logits(model)
    model.save_pretrained(tmp_path / "packed")
    expect_dense(model.dequantize(), name, "llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    again = read(tmp_path / "dense")
    assert torch.equal(logits(again), logits(model)) and report(again) is None
    assert not {t.dtype for t in tensors_of(tmp_path / "dense").values()} - {torch.bfloat16}


def test_what_trains_and_what_does_not_stays_so():
    model = load("ct-nvfp4a16", "llama-bias").train()
    model.model.layers[0].eval()
    model.dequantize()
    assert model.model.layers[1].mlp.up_proj.training and not model.model.layers[0].mlp.up_proj.training
    assert load("ct-nvfp4a16", quantization_config=choosing("ct-nvfp4a16", dequantize=True)).training is False


def test_logits_are_those_of_the_packed_model():
    found = logits(load("modelopt-w4a16", dtype=torch.float32).dequantize())
    assert relative(found, logits(loaded("modelopt-w4a16", "llama", torch.float32))) <= 1e-5
