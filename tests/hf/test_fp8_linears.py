"""What is left to transformers: FP8 linears of DeepSeek-V4 where it runs them itself, and GPUs with FP4 tensor cores.

Running FP8 takes a GPU; here they are loaded and saved.
"""

import pytest
import torch
import transformers
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import marlin_w4a16.hf.quantizer
from checkpoints.formats import FORMATS, written
from hf.dense import tensors_of
from hf.loading import read, same
from marlin_w4a16.hf.experts.modules import CheckpointExperts
from marlin_w4a16.kernels.target import Target


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As if there were a GPU and kernels for it."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(marlin_w4a16.hf.quantizer, "is_kernels_available", lambda: True)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("deepseek")])
def test_fp8_linears_stay_fp8_beside_packed_experts(name, tmp_path):
    folder = written(name, "deepseekv4")
    before, model = tensors_of(folder), read(folder)
    fp8 = {path for path, module in model.named_modules() if isinstance(module, FP8Linear)}
    assert len(fp8) == sum(t.dtype == torch.float8_e4m3fn for t in before.values())
    assert all(type(layer.mlp.experts) is CheckpointExperts for layer in model.model.layers)
    assert type(model.lm_head) is torch.nn.Linear
    model.save_pretrained(tmp_path)
    after = tensors_of(tmp_path)
    assert after.keys() == before.keys() and [n for n in before if not same(after[n], before[n])] == []


def test_without_kernels_they_are_decoded_and_that_is_said(monkeypatch, caplog):
    monkeypatch.setattr(marlin_w4a16.hf.quantizer, "is_kernels_available", lambda: False)
    model = read(written("deepseek-v4", "deepseekv4"))
    assert not any(isinstance(module, FP8Linear) for module in model.modules())
    assert "FP8 linears are decoded to torch.bfloat16" in caplog.text
    with torch.no_grad():
        assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_gpus_that_this_project_leaves_are_left_to_transformers(monkeypatch):
    config = transformers.Mxfp4Config()
    assert marlin_w4a16.hf.quantizer.Mxfp4Quantizer(config, pre_quantized=True).scheme is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, left in (((8, 0), False), ((9, 0), False), ((7, 5), True), ((10, 0), True), ((12, 0), True)):
        monkeypatch.setattr(Target, "of", lambda _, found=capability: Target(found, 1))
        assert marlin_w4a16.hf.quantizer.left_to_transformers() == left
        assert (marlin_w4a16.hf.quantizer.Mxfp4Quantizer(config, pre_quantized=True).scheme is None) == left
