"""Checkpoints whose config.json does not say how they are quantised, and quantisation configs that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from checkpoints.formats import write, written
from hf.loading import loaded, logits, read
from marlin_w4a16.checkpoints.files import HF_QUANT_CONFIG
from marlin_w4a16.hf import CheckpointError, announced, report

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
