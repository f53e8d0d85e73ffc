"""Checkpoints whose config.json does not say how they are quantised, and quantisation configs that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from checkpoints.formats import write, written
from hf.damaged import SINGLE
from hf.loading import loaded, logits, read
from marlin_w4a16.checkpoints.files import HF_QUANT_CONFIG, INDEX
from marlin_w4a16.cli.inspection import inspect
from marlin_w4a16.hf import CheckpointError, ModelOptConfig, announced, report

NAME = "modelopt-nvfp4"


def change(folder: Path, **entries: Any) -> None:
    """Entries of config.json are others; None: they are not there."""
    whole = {**json.loads((folder / "config.json").read_text()), **entries}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if value is not None}))


def test_hf_quant_config_alone_is_found(tmp_path):
    folder = write(NAME, "llama", tmp_path)
    change(folder, quantization_config=None)
    config = AutoConfig.from_pretrained(folder).quantization_config
    assert config == {**json.loads((folder / HF_QUANT_CONFIG).read_text()), "quant_method": "modelopt"}
    model = read(folder)
    assert torch.equal(logits(model), logits(loaded(NAME, "llama", torch.bfloat16)))
    assert len(report(model).layers) == 14


def test_config_json_goes_before_it(tmp_path):
    folder = write("modelopt-mxfp4", "llama", tmp_path)
    (folder / HF_QUANT_CONFIG).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert AutoConfig.from_pretrained(folder).quantization_config["quant_algo"].upper() == "MXFP4"
    assert report(read(folder)).scheme.algorithm == "MXFP4"


def test_a_dense_checkpoint_is_left_as_it_is(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")


def test_the_file_of_another_folder_is_not_looked_for(tmp_path):
    """A part of a model has a config of its own."""
    folder = write(NAME, "llama", tmp_path)
    change(folder, quantization_config=None, model_type=None)
    assert "quantization_config" not in LlamaConfig.get_config_dict(folder)[0]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "value, said",
    [
        ("NVFP4", ": found str, expected an object"), ([1], ": found list, expected an object"),
        ({"quant_algo": "NVFP4"}, ".quant_method: found None, expected a name such as 'modelopt'"),
        ({"quant_method": 3}, ".quant_method: found 3, expected a name such as 'modelopt'"),
    ],
)  # fmt: skip
def test_a_quantisation_config_that_is_none(value, said, inside, tmp_path):
    folder = write(NAME, "llama", tmp_path)
    change(
        folder,
        quantization_config=None if inside else value,
        text_config={"quantization_config": value} if inside else None,
    )
    for reads in (AutoConfig.from_pretrained, read):
        with pytest.raises(CheckpointError) as caught:
            reads(folder)
        assert str(caught.value) == f"{folder}: config.json: quantization_config{said}"


def test_a_config_of_bitsandbytes_need_not_name_itself(tmp_path):
    folder = write(NAME, "llama", tmp_path)
    change(folder, quantization_config={"load_in_8bit": True})
    assert LlamaConfig.get_config_dict(folder)[0]["quantization_config"] == {"load_in_8bit": True}


def test_a_config_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ' * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: found deep nesting, expected a JSON file"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "entry, said",
    [({"ignore": 3}, ".ignore: found 3, expected a list of strings"),
     ({"quant_algo": None}, ".quant_algo: found null, expected one of ")],
)  # fmt: skip
def test_entries_of_another_type_are_named(entry, said, tmp_path):
    folder = write(NAME, "llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(folder, quantization_config={**config, **entry})
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    assert str(caught.value).startswith(f"config.json: quantization_config{said}")


def test_wrapping_twice_changes_nothing():
    before = PreTrainedConfig.get_config_dict.__func__
    announced.wrap()
    assert PreTrainedConfig.get_config_dict.__func__ is before and before.announces
    assert AutoConfig.from_pretrained(written(NAME, "llama")).quantization_config["quant_method"] == "modelopt"


LAYER = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4", "ct-mxfp4a16"])
@pytest.mark.parametrize(
    "entries",
    [{"quant_method": "mine"}, {"quant_method": ""}, {"quant_method": "fp8"},
     {"quant_method": "compressed-tensors", "config_groups": {}, "format": None}],
)  # fmt: skip
def test_fp4_tensors_that_nobody_would_read(entries, name, tmp_path):
    """transformers would give their weights random values."""
    folder = write(name, "llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(folder, quantization_config={**config, "ignore": [], **entries})
    where = r"config\.json: quantization_config\.quant_method"
    with pytest.raises(
        CheckpointError, match=rf"{where}: found {entries['quant_method']!r} beside {LAYER}\.\w+, expect"
    ):
        read(folder)


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-mxfp4a16"])
def test_fp4_tensors_without_any_config(name, shards, tmp_path):
    folder = write(name, "llama", tmp_path, shards)
    (folder / HF_QUANT_CONFIG).unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match=r"^config\.json: quantization_config\.quant_algo: found null, expected "):
        read(folder)
    assert inspect(folder).problems
    if name.startswith("modelopt"):  # the user may give it
        model = read(folder, quantization_config=ModelOptConfig(**values))
        assert torch.equal(logits(model), logits(loaded(name, "llama", torch.bfloat16)))


def test_files_of_a_dense_checkpoint_are_not_judged(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    for content in (b"", b"\xff" * 100):
        (tmp_path / SINGLE).write_bytes(content)
        assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text("{")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")


@pytest.mark.parametrize("value", [False, 0, "", []])
def test_an_empty_value_of_another_type(value, tmp_path):
    folder = write(NAME, "llama", tmp_path)
    change(folder, quantization_config=value)
    with pytest.raises(
        CheckpointError, match=rf"quantization_config: found {type(value).__name__}, expected an object"
    ):
        read(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": null}', '{"weight_map": {"a": "b.safetensors"}}'])
def test_an_index_that_transformers_cannot_read(content, tmp_path):
    folder = write(NAME, "llama", tmp_path, shards=True)
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{INDEX}: .*expected "):
        read(folder)


def test_an_error_names_the_file_in_which_the_config_stands(tmp_path):
    folder = write(NAME, "llama", tmp_path)
    change(folder, quantization_config=None)
    (folder / HF_QUANT_CONFIG).write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": 3}}))
    with pytest.raises(
        CheckpointError, match=r"^hf_quant_config\.json\.quantization\.exclude_modules: found 3, expected"
    ):
        read(folder)


def test_what_compressed_tensors_does_not_take(tmp_path):
    folder = write("ct-nvfp4", "llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"]["unknown"] = 1
    change(folder, quantization_config=config)
    said = "config.json: quantization_config: found one that CompressedTensorsConfig does not take: "
    with pytest.raises(CheckpointError, match=said):
        read(folder)
    (problem,) = inspect(folder).problems
    assert str(problem).startswith(said[:40]) and "unknown" in problem.found


def test_the_dtype_of_mlx_is_looked_at(tmp_path):
    """Names alone do not tell it."""
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    for dtype, is_quantised in ((torch.uint32, True), (torch.float32, False)):
        weight = torch.zeros(4, 4, dtype=torch.int32).view(dtype)
        save_file({"a.weight": weight, "a.scales": torch.zeros(4, 1)}, tmp_path / SINGLE)
        assert hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config") == is_quantised
