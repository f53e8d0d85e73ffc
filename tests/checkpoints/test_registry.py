"""Which file reads a checkpoint; a new format is a file and a row."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import marlin_w4a16.hf
from checkpoints.formats import FORMATS, write, written
from hf.loading import read
from marlin_w4a16.checkpoints import files, registry
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.scheme import LINEAR, Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage, Part
from marlin_w4a16.cli import bench
from marlin_w4a16.cli.inspection import inspect
from marlin_w4a16.cli.measure import Work

PARTS = (Part("toy_codes", "codes", ("U8",), ("n", "k/2")), Part("toy_scales", "scales", ("U8",), ("n", "k/g")))
TOY = FP4Storage("toy MXFP4", "e8m0", (32,), PARTS)
OTHER = files.HF_QUANT_CONFIG
LEAVES = {"weight_packed": "toy_codes", "weight_scale": "toy_scales"}


@pytest.mark.parametrize("name", FORMATS)
def test_schemes_name_the_producer_of_their_row(name):
    folder = written(name, FORMATS[name].family)
    _, config = files.quantization_of(folder)
    scheme = registry.scheme_of(config, files.model_config_of(folder))
    producers = [row.producer for row in registry.FORMATS if row.method == config["quant_method"]]
    assert [scheme.producer] == producers if name != "ct-fp8" else scheme is None


@pytest.mark.parametrize("config", [{}, {"quant_method": None}, {"quant_method": "gptq"}, {"quant_method": "fp8"}])
def test_a_config_of_no_format_that_is_read_here(config):
    assert registry.scheme_of(config, {}) is None


@pytest.mark.parametrize("file, where", [("config.json", "config.json: quantization_config"), (OTHER, OTHER)])
def test_an_error_names_the_file_of_the_config(file, where):
    with pytest.raises(CheckpointError) as caught:
        registry.scheme_of({"quant_method": ["modelopt"]}, {}, where=file)
    assert str(caught.value) == f"{where}.quant_method: found a list, expected a string"
    scheme = registry.scheme_of({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}, where=file)
    assert scheme.where == where


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Path:
    """A checkpoint of a format that only its row knows."""
    from transformers.quantizers import auto

    row = registry.CheckpointFormat("Toy", "toy", lambda config, _: Scheme("Toy", config.text("size"), {LINEAR: TOY}))
    monkeypatch.setattr(registry, "FORMATS", (*registry.FORMATS, row))
    for mapping in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        monkeypatch.setattr(auto, mapping, dict(getattr(auto, mapping)))
    marlin_w4a16.hf._register()
    folder, tensors = write("ct-mxfp4a16", "llama", tmp_path / "toy"), {}
    for name, tensor in load_file(folder / files.SINGLE).items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{path}.{LEAVES.get(leaf, leaf)}"] = tensor
    save_file(tensors, folder / files.SINGLE, {"format": "pt"})
    config = files.read_json(folder / "config.json")
    config["quantization_config"] = {"quant_method": "toy", "size": "four"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_row_is_all_that_inspect_and_the_plugin_need(toy, tmp_path):
    found = inspect(toy, values=True)
    assert (found.producer, found.algorithm, found.problems) == ("Toy", "four", ())
    assert found.formats == {"MXFP4 group 32": 14}
    model = read(toy)
    assert str(marlin_w4a16.hf.report(model)).count("MXFP4 group 32") >= 7
    of_compressed, tokens = read(written("ct-mxfp4a16", "llama")), torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, of_compressed(tokens).logits)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / files.SINGLE) for folder in (toy, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert files.quantization_of(tmp_path / "again") == files.quantization_of(toy)


def test_a_row_is_all_that_bench_needs(toy):
    dense = bench.load(inspect(toy), Work(1, 4, 2, "bfloat16", "cpu"), dequantize=True)
    assert type(dense.model.layers[0].mlp.up_proj) is torch.nn.Linear
