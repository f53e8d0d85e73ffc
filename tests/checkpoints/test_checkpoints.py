"""Checkpoints are what their names say, and damage is what it says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import damage
from checkpoints.formats import FORMATS, write, written

Q = "model.layers.0.self_attn.q_proj"
NOT_FP4 = ("modelopt-fp8", "ct-fp8")
PUBLISHED = {"gptoss": "mxfp4", "deepseekv4": "fp8"}


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_packs_its_weights_and_says_whose_it_is(name):
    state = torch.random.get_rng_state()
    made = FORMATS[name]
    folder = written(name, made.family)
    assert torch.equal(torch.random.get_rng_state(), state)
    codes = (torch.uint8, torch.int8)
    packed = {path for path, tensor in tensors(folder).items() if tensor.dtype in codes and "scale" not in path}
    assert bool(packed) == (name not in NOT_FP4)
    assert config(folder)["quant_method"] == PUBLISHED.get(made.family, made.producer.lower())
    assert (folder / "hf_quant_config.json").exists() == (made.producer == "ModelOpt" and name != "modelopt-nemotron")


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4a16"])
def test_some_scales_are_subnormal_and_global_scales_differ(name):
    found = tensors(written(name, "llama"))
    scales = torch.cat([t.flatten() for t in found.values() if t.dtype == torch.float8_e4m3fn]).view(torch.uint8)
    assert set(scales.tolist()) >= set(range(1, 8)) and 0 not in scales
    factors = {t.item() for path, t in found.items() if path.endswith(("weight_scale_2", "weight_global_scale"))}
    assert len(factors) >= 8


@pytest.mark.parametrize("family", ["qwen3moe", "mixtral"])
@pytest.mark.parametrize("name", ["modelopt-w4a16", "ct-nvfp4a16"])
def test_experts_are_packed_one_by_one(name, family):
    packed = "weight" if name.startswith("modelopt") else "weight_packed"
    names = {"qwen3moe": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w2", "w3")}[family]
    block, found = {"qwen3moe": "mlp", "mixtral": "block_sparse_moe"}[family], tensors(written(name, family))
    for part in names:
        assert found[f"model.layers.1.{block}.experts.3.{part}.{packed}"].dtype == torch.uint8


def test_tied_heads_are_not_stored():
    for name in ("modelopt-w4a16", "ct-nvfp4a16"):
        assert "lm_head.weight" not in tensors(written(name, "gemma3-tied"))
        assert "lm_head.weight" in tensors(written(name, "gemma3"))


def test_shards_hold_the_same():
    whole, parts = written("ct-nvfp4", "llama"), written("ct-nvfp4", "llama", shards=True)
    assert len(list(parts.glob("*.safetensors"))) > 1
    expected, found = tensors(whole), tensors(parts)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path].view(torch.uint8), t.view(torch.uint8)) for path, t in expected.items())


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", ["modelopt-w4a16", "ct-mxfp4a16"])
def test_damage(name, shards, tmp_path):
    folder, scale = write(name, "llama", tmp_path / "model", shards), f"{Q}.weight_scale"
    before = tensors(folder)
    damage.not_a_number(folder, scale)
    assert tensors(folder)[scale].view(torch.uint8)[-1, -1] in (0x7F, 0xFF)
    damage.cut_columns(folder, scale)
    assert tensors(folder)[scale].shape[1] == before[scale].shape[1] - 1
    damage.cast(folder, scale, torch.float32)
    assert tensors(folder)[scale].dtype == torch.float32
    damage.put(folder, f"{Q}.surplus", torch.zeros(3))
    damage.drop(folder, scale)
    assert tensors(folder).keys() == before.keys() - {scale} | {f"{Q}.surplus"}
    damage.configure(folder, quant_method="other", ignore=None)
    assert config(folder)["quant_method"] == "other" and "ignore" not in config(folder)
    damage.truncate(folder, f"{Q}.surplus")
    with pytest.raises(SafetensorError):
        tensors(folder)
    assert scale in tensors(written(name, "llama", shards))


@pytest.mark.parametrize("shards", [False, True])
def test_an_index_that_leads_outside(shards, tmp_path):
    folder, name = write("modelopt-w4a16", "llama", tmp_path / "model", shards), f"{Q}.weight"
    before = tensors(folder)
    outside = damage.lead_outside(folder, name)
    index = json.loads((folder / damage.INDEX).read_text())["weight_map"]
    assert index[name] == "../x.safetensors" and (folder / index[name]).resolve() == outside.resolve()
    assert index.keys() == before.keys() and tensors(folder).keys() == before.keys() - {name}
    assert torch.equal(load_file(outside)[name], before[name])
