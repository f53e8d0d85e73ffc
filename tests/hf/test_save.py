"""save_pretrained: the files are what was loaded, bit for bit, and load again."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoints.formats import write, written
from checkpoints.names import renamed
from hf.dense import relative, split, tensors_of
from hf.dense_experts import is_expert
from hf.loading import (
    DTYPES,
    experts_of,
    kinds,
    linears,
    load,
    loaded,
    logits,
    model_type,
    read,
    reference,
    same,
    stored,
    upstream_saves,
)
from hf.matrix import FEW, FEW_ON_LLAMA, MIXTURES, ON_LLAMA, OWN_HEADS, SAVE, params
from marlin_w4a16.hf import CheckpointError, ModelOptConfig


def config(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def expect_the_checkpoint(folder, name, family="llama", dtype=torch.bfloat16):
    """Everything as it was; what is not quantised in the dtype of the model."""
    found, before = tensors_of(folder), stored(name, family)
    assert found.keys() == before.keys()
    for key, tensor in before.items():
        assert same(found[key], tensor.to(dtype_of(key, tensor, name, family, dtype))), key
    expected = {**config(written(name, family)), "dtype": str(dtype).removeprefix("torch.")}
    assert config(folder) == expected


def dtype_of(key, tensor, name, family, dtype) -> torch.dtype:
    """That of a tensor that is saved from a model of a dtype."""
    in_model = renamed(key, model_type(name, family))
    plain = reference(name, family, dtype).state_dict()
    path, leaf = split(in_model)
    upstream = name.startswith("ct-") and linears(name, family).get(path) == "Linear" and leaf == "weight_scale"
    quantised = is_expert(path) or path in linears(name, family)
    if upstream_saves(name, dtype) or tensor.dtype == torch.uint8:
        return tensor.dtype
    if upstream or leaf == "bias" or (in_model in plain and not quantised):
        return plain[in_model].dtype if in_model in plain else dtype
    return tensor.dtype


@pytest.mark.parametrize("name, family", params(SAVE.cases))
def test_what_is_saved_is_what_was_loaded(name, family, tmp_path):
    load(name, family).save_pretrained(tmp_path)
    expect_the_checkpoint(tmp_path, name, family)
    assert torch.equal(logits(read(tmp_path)), logits(loaded(name, family, torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name, family", params(ON_LLAMA, FEW_ON_LLAMA))
def test_a_model_of_another_dtype(name, family, dtype, tmp_path):
    model = load(name, dtype=dtype)
    model.save_pretrained(tmp_path)
    expect_the_checkpoint(tmp_path, name, dtype=dtype)
    assert relative(logits(read(tmp_path)), logits(model)) == 0


@pytest.mark.parametrize("name, family", MIXTURES)
def test_mixtures_in_shards_and_another_dtype(name, family, tmp_path):
    load(name, family, shards=True, dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expect_the_checkpoint(tmp_path, name, family, torch.float32)
    assert torch.equal(logits(read(tmp_path)), logits(loaded(name, family, torch.float32)))


@pytest.mark.parametrize(
    "name, family", [("ct-mxfp4a16", "llama"), ("ct-mxfp4a16", "deepseekv3"), ("gpt-oss", "gptoss")]
)
def test_rows_whose_scales_float16_does_not_hold(name, family, tmp_path):
    """They are packed with other scales, and saved with their own."""
    folder = write(name, family, tmp_path / "before")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for key, scales in tensors.items():
            if key.endswith(("weight_scale", "_scales")):
                scales[..., 1, :] -= 60
        save_file(tensors, file, {"format": "pt"})
    read(folder).save_pretrained(tmp_path / "after")
    found, before = tensors_of(tmp_path / "after"), tensors_of(folder)
    assert found.keys() == before.keys() and all(same(found[key], tensor) for key, tensor in before.items())


def test_gates_and_ups_that_are_stored_differently(tmp_path):
    """The same scales in other dtypes: two stacks that are not read as one, with the weights of before."""
    folder = write("deepseek-v4", "deepseekv4", tmp_path / "before")
    tensors = load_file(folder / "model.safetensors")
    gates = [key for key in tensors if key.endswith(".w1.scale")]
    tensors |= {key: tensors[key].float() for key in gates}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = read(folder)
    assert gates and torch.equal(logits(model), logits(loaded("deepseek-v4", "deepseekv4", torch.bfloat16)))
    model.save_pretrained(tmp_path / "after")
    found = tensors_of(tmp_path / "after")
    assert all(found[key].dtype == torch.float32 and torch.equal(found[key], tensors[key]) for key in gates)


def test_an_expert_that_float16_does_not_hold_changes_no_other(tmp_path):
    """Experts are packed together: one keeps its scales, since no power of two helps it, its neighbours do not."""
    folder = write("gpt-oss", "gptoss", tmp_path / "before")
    tensors = load_file(folder / "model.safetensors")
    for key, scales in tensors.items():
        if key.endswith("_scales"):
            scales[1, 1] -= 60
            scales[2, 1, ::2] -= 60
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = read(folder)
    for path, experts in experts_of(model).items():
        for weight, name in zip(experts.to_fp4(), ("gate_up_proj", "down_proj"), strict=True):
            before = tensors[f"{path}_{name}_scales" if path.endswith(name) else f"{path}.{name}_scales"]
            changed = (weight.scales != before).flatten(1).any(-1)
            assert changed.tolist() == [False, True, False, False]
    model.save_pretrained(tmp_path / "after")
    found = tensors_of(tmp_path / "after")
    assert found.keys() == tensors.keys() and all(same(found[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("from_shards", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_shards(name, from_shards, tmp_path):
    load(name, shards=from_shards).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expect_the_checkpoint(tmp_path, name)
    assert torch.equal(logits(read(tmp_path)), logits(loaded(name, "llama", torch.bfloat16)))


@pytest.mark.parametrize("name", FEW)
def test_a_model_that_ran_and_its_copies_are_saved_alike(name, tmp_path):
    model = load(name)
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    for at, saved in enumerate([model, copy.deepcopy(model), model, read(tmp_path / "before")]):
        saved.save_pretrained(tmp_path / str(at))
        expect_the_checkpoint(tmp_path / str(at), name)
        assert torch.equal(logits(saved), expected)


@pytest.mark.parametrize("family", ["llama-bias", "qwen3-tied", "gemma3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_and_tied_heads_in_other_dtypes(family, dtype, tmp_path):
    load("ct-mxfp4a16", family, dtype=dtype).save_pretrained(tmp_path)
    expect_the_checkpoint(tmp_path, "ct-mxfp4a16", family, dtype)


CASTS = {
    "to float32": lambda m: m.to(torch.float32),
    "to float32 and back": lambda m: m.to(torch.float32).to(torch.bfloat16),
    "half": nn.Module.half,
    "half and back": lambda m: nn.Module.half(m).to(torch.bfloat16),
    "double and back": lambda m: nn.Module.double(m).to(torch.bfloat16),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["modelopt-mixed", "modelopt-awq", "ct-nvfp4", "ct-mxfp4a16", "ct-kv"])
def test_casts_leave_the_checkpoint_as_it_is(name, cast, tmp_path):
    model = CASTS[cast](load(name))
    if name == "modelopt-mixed" and "half" in cast:  # float16 cannot hold these dense weights
        with pytest.raises(CheckpointError, match="no FP8 codes"):
            model.save_pretrained(tmp_path)
        return
    model.save_pretrained(tmp_path)
    found, quantised = tensors_of(tmp_path), kinds(name, "llama")
    for key, tensor in stored(name).items():
        if key.rpartition(".")[0] in quantised or key.endswith("_scale"):
            assert same(found[key], tensor), key


@pytest.mark.parametrize("name, family", OWN_HEADS)
def test_a_head_of_its_own_is_saved_after_weights_are_tied_again(name, family, tmp_path):
    model = load(name, family)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    expect_the_checkpoint(tmp_path, name, family)


def test_the_files_are_marked_as_of_pytorch(tmp_path):
    load("ct-nvfp4").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_changed_weight_is_not_saved_in_the_checkpoints_format(tmp_path):
    model = load("ct-nvfp4a16")
    linear = model.model.layers[0].mlp.up_proj
    linear.words.data[0, 0] ^= 1
    model.save_pretrained(tmp_path / "codes")  # other codes under the same scales are a checkpoint like any other
    linear.multiplier.data *= 2
    with pytest.raises(CheckpointError, match=r"up_proj: found another weight than the checkpoint's"):
        model.save_pretrained(tmp_path)
    fp8 = load("modelopt-mixed")
    fp8.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 0.3
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: found values that are no FP8 codes"):
        fp8.save_pretrained(tmp_path)


def test_scales_of_other_formats_that_float16_lost_are_not_saved(tmp_path):
    """transformers casts the scales of FP8 layers to the dtype of the model; a row of this one is below float16."""
    model = load("ct-nvfp4-fp8", dtype=torch.float16)
    before = logits(model)
    with pytest.raises(CheckpointError, match="save before the first forward, or load in bfloat16"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)


def test_a_checkpoint_with_its_config_in_a_file_of_its_own(tmp_path):
    folder = write("modelopt-nvfp4", "llama", tmp_path / "older")
    whole = config(folder)
    del whole["quantization_config"]
    (folder / "config.json").write_text(json.dumps(whole))
    model = read(folder)
    assert torch.equal(logits(read(folder, quantization_config=ModelOptConfig.of(folder))), logits(model))
    assert torch.equal(logits(model), logits(loaded("modelopt-nvfp4", "llama", torch.bfloat16)))
    model.save_pretrained(tmp_path / "saved")
    found, before = tensors_of(tmp_path / "saved"), stored("modelopt-nvfp4")
    assert found.keys() == before.keys() and all(same(found[key], tensor) for key, tensor in before.items())
    assert torch.equal(logits(read(tmp_path / "saved")), logits(model))
