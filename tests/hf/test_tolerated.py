"""What loads though files, config and model differ: with a note where something is not as it was said."""

import re

import pytest
import torch

from checkpoints import damage
from checkpoints.formats import write
from hf.damaged import SINGLE, Q, load, of, of_model, packed
from hf.loading import loaded, logits, same
from marlin_w4a16.cli.inspection import inspect
from marlin_w4a16.hf import report


@pytest.mark.parametrize("name, leaf", [("modelopt-nvfp4", "input_scale"), ("ct-nvfp4", "input_global_scale")])
def test_the_scale_of_an_input_may_be_missing(name, leaf, tmp_path):
    folder = write(name, "llama", tmp_path)
    damage.drop(folder, f"{Q}.{leaf}")
    assert len(packed(load(folder))) == 14


def test_the_scales_of_the_inputs_of_some_experts_may_be_missing(tmp_path):
    """As exports have it for experts that calibration did not reach."""
    folder = write("modelopt-nvfp4", "mixtral", tmp_path / "before")
    experts = "model.layers.1.block_sparse_moe.experts"
    for lost in ("0.w1", "2.w1", "3.w2"):
        damage.drop(folder, f"{experts}.{lost}.input_scale")
    damage.put(folder, f"{experts}.1.w2.input_scale", torch.tensor(torch.nan))
    model = load(folder)
    assert torch.equal(logits(model), logits(loaded("modelopt-nvfp4", "mixtral", torch.bfloat16)))
    model.save_pretrained(tmp_path / "after")
    found, before = (damage.load_file(tmp_path / name / SINGLE) for name in ("after", "before"))
    assert found.keys() == before.keys() and all(same(found[key], tensor) for key, tensor in before.items())


def test_the_offsets_of_a_quantised_cache_are_kept(tmp_path):
    """ModelOpt's NVFP4_AFFINE writes them beside the scales."""
    folder = write("modelopt-kv-nvfp4", "llama", tmp_path / "before")
    for i, part in ((0, "k"), (0, "v"), (1, "k"), (1, "v")):
        damage.put(folder, f"model.layers.{i}.self_attn.{part}_proj.{part}_bias", torch.randn(1, 2, 1, 24).bfloat16())
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()) and len(packed(model)) == 14
    assert [line.count for line in inspect(folder).lines if line.outcome == "unused"] == [2] * 4
    model.save_pretrained(tmp_path / "after")
    found, before = (damage.load_file(tmp_path / name / SINGLE) for name in ("after", "before"))
    assert found.keys() == before.keys() and all(same(found[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, leaf", [("modelopt-nvfp4", "weight_scale_2"), ("ct-nvfp4", "weight_global_scale")])
def test_global_scales_of_16_bits(name, leaf, dtype, tmp_path):
    """Their values in float32 are what decodes, and they are saved as they were."""
    folders = [write(name, "llama", tmp_path / str(at)) for at in range(2)]
    for folder in folders:
        damage.alter(folder, of(leaf), lambda t: t.to(dtype))
    damage.cast(folders[1], of(leaf), torch.float32)
    narrow, wide = map(load, folders)
    assert torch.equal(logits(narrow), logits(wide)) and len(packed(narrow)) == 14
    narrow.save_pretrained(tmp_path / "saved")
    found, before = (damage.load_file(folder / SINGLE) for folder in (tmp_path / "saved", folders[0]))
    assert found.keys() == before.keys() and all(same(found[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name, leaf", [("modelopt-nvfp4", "weight"), ("ct-nvfp4", "weight_packed")])
@pytest.mark.parametrize("pattern", [Q, {"modelopt": "*self_attn.q*", "ct": "re:.*self_attn.q"}])
def test_fp4_tensors_of_an_ignored_layer(name, leaf, pattern, tmp_path, error):
    """Whole ones are loaded, with a note; what is left of others is none."""
    pattern = pattern if isinstance(pattern, str) else pattern[name.split("-")[0]]
    folder = write(name, "llama", tmp_path)
    damage.configure(folder, ignore=["lm_head", pattern])
    model = load(folder)
    assert len(packed(model)) == 14
    assert torch.equal(logits(model), logits(loaded(name, "llama", torch.bfloat16)))
    more = "" if pattern == Q else " and 1 more"
    note = f"{Q}{more}: NVFP4 group 16 as stored, though the config says it is ignored by {pattern!r}"
    assert note in report(model).notes
    damage.drop(folder, of("weight_scale"))
    expected = f"expected a dense weight: the config says it is ignored by {pattern!r}"
    assert error(folder) == f"{folder} cannot be loaded:\n  {SINGLE}: {Q}.{leaf}: found U8 [96, 48], {expected}"


@pytest.mark.parametrize(
    "name, change, note",
    [
        ("modelopt-mxfp4", {"quant_algo": "W4A16_NVFP4"},
         "13 more: MXFP4 group 32 as stored, though the config says it is ModelOpt W4A16_NVFP4"),
        ("modelopt-mixed", {"quantized_layers": {Q: {"quant_algo": "FP8"}}, "config_groups": {}},
         "6 more: FP8 E4M3 as stored, though the config says it is not among the quantised layers"),
        ("modelopt-nvfp4", {"group_size": 32},
         "13 more: NVFP4 group 16 as stored, though the config says it is ModelOpt NVFP4"),
    ],
)  # fmt: skip
def test_tensors_that_say_more_than_their_config(name, change, note, tmp_path):
    folder = write(name, "llama", tmp_path)
    damage.configure(folder, **change)
    model = load(folder)
    assert any(told.endswith(note) for told in report(model).notes)
    assert torch.equal(logits(model), logits(loaded(name, "llama", torch.bfloat16)))


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_a_tensor_that_only_the_index_has(name, tmp_path):
    folder = write(name, "llama", tmp_path, shards=True)
    damage.repoint(folder, {f"{Q}.other": damage.file_of(folder, of("weight_scale")).name})
    assert torch.equal(logits(load(folder)), logits(loaded(name, "llama", torch.bfloat16)))


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-mxfp4a16"])
def test_layers_that_the_model_does_not_have_are_told(name, auto, tmp_path):
    folder = write(name, "llama", tmp_path)
    of_model(num_hidden_layers=1)(folder)
    model = load(folder, auto)
    assert len(packed(model)) == 7
    (note,) = (told for told in report(model).notes if "not loaded" in told)
    assert re.fullmatch(r"model\.layers\.1\.\S+ and 6 more: not loaded, the model has no such layer", note)
