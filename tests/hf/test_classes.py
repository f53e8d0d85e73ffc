"""Other classes than the one that a checkpoint was saved from load it."""

import pytest
import torch
from torch import nn

from checkpoints.formats import write, written
from hf.damaged import load, of_model, packed


def same_body(model: nn.Module, whole: nn.Module) -> bool:
    tokens = torch.arange(8)[None]
    body, expected = getattr(model, "model", model), whole.model
    with torch.no_grad():
        return torch.equal(body(tokens).last_hidden_state, expected(tokens).last_hidden_state)


@pytest.mark.parametrize("name", ["modelopt-head", "ct-head", "modelopt-nvfp4", "ct-mxfp4a16"])
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_a_model_without_the_head_of_its_checkpoint(auto, name):
    folder = written(name, "llama")
    model, whole = load(folder, auto), load(folder)
    assert len(packed(model)) == 14 and len(packed(whole)) == 14 + name.endswith("head")
    assert same_body(model, whole)
    if auto != "AutoModel":
        assert type(model.score) is nn.Linear


@pytest.mark.parametrize("name", ["modelopt-head", "ct-head"])
def test_a_checkpoint_of_the_body(name, tmp_path):
    whole = load(written(name, "llama"))
    load(written(name, "llama"), "AutoModel").save_pretrained(tmp_path)
    for auto in ("AutoModel", "AutoModelForCausalLM"):
        model = load(tmp_path, auto)
        assert len(packed(model)) == 14 and same_body(model, whole)


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_layers_that_a_model_ignores(name, auto, tmp_path, monkeypatch):
    from transformers import LlamaPreTrainedModel

    folder = write(name, "llama", tmp_path)
    of_model(num_hidden_layers=1)(folder)
    monkeypatch.setattr(LlamaPreTrainedModel, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1\."])
    assert len(packed(load(folder, auto))) == 7
