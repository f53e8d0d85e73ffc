"""Copies of loaded models: deepcopy, pickle, torch.save and state dicts."""

import copy
import io
import pickle

import pytest
import torch

from hf.dense import tensors_of
from hf.loading import kinds, load, loaded, logits, same, stored
from hf.matrix import FEW_ON_LLAMA, ON_LLAMA, params
from marlin_w4a16 import refresh
from marlin_w4a16.hf import report


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": through_torch,
}  # fmt: skip


def expect_the_quantised_tensors(folder, name):
    found = tensors_of(folder)
    for key, tensor in stored(name).items():
        if key.rpartition(".")[0] in kinds(name, "llama"):
            assert same(found[key], tensor), key


@pytest.mark.parametrize(
    "name, family, way",
    # a hook of compressed-tensors on its FP8 layers cannot be pickled
    params(
        ((*case, way) for case in ON_LLAMA for way in COPIES if case[0] != "ct-nvfp4-fp8" or way == "deepcopy"),
        FEW_ON_LLAMA,
    ),
)
def test_a_copy_runs_and_is_saved_alike(name, family, way, tmp_path):
    model = load(name)
    found = COPIES[way](model)
    assert torch.equal(logits(found), logits(loaded(name, family, torch.bfloat16)))
    assert str(report(found)) == str(report(model))
    found.save_pretrained(tmp_path)
    expect_the_quantised_tensors(tmp_path, name)


def test_a_deepcopy_shares_nothing():
    model = load("ct-nvfp4")
    other = copy.deepcopy(model)
    other.model.layers[0].mlp.up_proj.words.data.zero_()
    assert torch.equal(logits(model), logits(loaded("ct-nvfp4", "llama", torch.bfloat16)))
    assert not torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name, family", params(ON_LLAMA, FEW_ON_LLAMA))
def test_state_dicts(name, family, tmp_path):
    model, other = load(name), load(name)
    assert torch.save({key: t.clone() for key, t in model.state_dict().items()}, tmp_path / "state.pt") is None
    for tensor in other.state_dict().values():
        tensor.zero_()
    loading = other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert not loading.missing_keys and not loading.unexpected_keys
    assert torch.equal(logits(other), logits(loaded(name, family, torch.bfloat16)))
    other.save_pretrained(tmp_path / "saved")
    expect_the_quantised_tensors(tmp_path / "saved", name)


def test_the_state_of_another_checkpoint_of_the_same_format(tmp_path):
    """It is saved as that one: global scales come with the weights."""
    model = load("ct-nvfp4a16")
    model.load_state_dict(load("ct-nvfp4a16", "mistral").state_dict())
    refresh(model)
    model.save_pretrained(tmp_path)
    found, expected = tensors_of(tmp_path), stored("ct-nvfp4a16", "mistral")
    assert found.keys() == expected.keys() and all(same(found[key], t) for key, t in expected.items())


def test_the_state_of_another_format_is_refused():
    before = {key: t.clone() for key, t in load("ct-nvfp4a16").state_dict().items()}
    model = load("ct-nvfp4a16")
    with pytest.raises(RuntimeError, match="found a weight packed as"):
        model.load_state_dict(load("ct-mxfp4a16").state_dict(), strict=False)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items() if "proj" in key)
