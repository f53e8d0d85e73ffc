"""A checkpoint held against the model that its config names, and FP4 that nobody reads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import damage
from checkpoints.formats import write
from checkpoints.models import FAMILIES
from marlin_w4a16.__main__ import main
from marlin_w4a16.checkpoints.registry import FORMATS
from marlin_w4a16.cli import inspection
from marlin_w4a16.cli.inspection import inspect

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write("ct-mxfp4a16", "llama", tmp_path / "model")


def problems(folder: Path) -> list[str]:
    """What keeps a folder from being loaded."""
    found = [str(problem) for problem in inspect(folder).problems]
    assert main(["inspect", str(folder)]) == bool(found)
    return found


def test_what_the_model_needs_and_no_file_holds(folder):
    for name in ("model.norm.weight", "model.embed_tokens.weight", f"{DOWN}.weight_packed", f"{DOWN}.weight_scale"):
        damage.drop(folder, name)
    assert problems(folder) == [
        "model.embed_tokens.weight: found no such tensor in any file, expected one of shape [208, 96]",
        f"{DOWN}.weight: found no such tensor in any file, expected one (compressed-tensors mxfp4-pack-quantized)",
        "model.norm.weight: found no such tensor in any file, expected one of shape [96]",
    ]


def test_without_transformers_it_is_not_held_against_a_model(folder, monkeypatch):
    damage.drop(folder, "model.norm.weight")
    monkeypatch.setattr(inspection, "find_spec", lambda name: None)
    assert not problems(folder)
    assert inspect(folder).notes == ("not held against a model: transformers is not installed",)


def test_a_model_of_another_width(folder):
    damage.configure_model(folder, intermediate_size=192)
    found = problems(folder)
    expected = (
        f"{FILE}: {DOWN}.weight_packed: found MXFP4 group 32 of 96 x 160, expected 96 x 192, as the model's {DOWN} has"
    )
    assert expected in found and len(found) == 6


def test_what_is_not_as_the_config_says_is_noted(folder):
    damage.configure_model(folder, num_hidden_layers=1)
    damage.edit(
        folder, f"{UP}.weight_packed", lambda tensors: [tensors.pop(f"{UP}.weight_{n}") for n in ("packed", "scale")]
    )
    damage.put(folder, f"{UP}.weight", torch.ones(160, 96).bfloat16())
    assert not problems(folder)
    surplus, dense = sorted(inspect(folder).notes, key=len)
    assert surplus.startswith("model.layers.1.") and surplus.endswith(
        " and 6 more: not loaded, the model has no such layer"
    )
    assert dense == f"{UP}: dense in the files, though the config says they are FP4; loaded as they are"


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"architectures": ["LlamaForEverything"]}, "has no class LlamaForEverything"),
        ({"architectures": ["LlamaConfig"]}, "has no class LlamaConfig"),
        ({"architectures": None}, "has no class None"), ({"model_type": "new"}, "`new`"),
        ({"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}, "contains custom code"),
    ],
)  # fmt: skip
def test_a_model_that_transformers_does_not_have_is_noted(changes, why, folder):
    damage.configure_model(folder, **changes)
    damage.drop(folder, "model.norm.weight")  # which is not known then
    (note,) = inspect(folder).notes
    assert note.startswith("not held against a model: ") and why in note and not problems(folder)


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"num_hidden_layers": -1.5}, {"num_attention_heads": 0}])
def test_a_config_of_which_no_model_can_be_made(changes, folder):
    damage.configure_model(folder, **changes)
    (found,) = problems(folder)
    assert found.startswith("config.json: ") and found.endswith("expected a valid one") and "no model" in found


def plain(folder: Path, config: dict | None, *scales: str) -> Path:
    """A dense checkpoint with a quantisation config, and tensors that are none of the model's."""
    FAMILIES["llama"]().save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))
    tensors = {**load_file(folder / FILE), **{f"{UP}.{leaf}": torch.ones(()) for leaf in scales}}
    save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "config, scales, found",
    [
        ({"quant_method": "quark", "export": {"dtype": "fp4"}}, (), "quantization_config: found FP4 of quark"),
        ({"quant_method": "auto-round", "data_type": "nv_FP4"}, (), "quantization_config: found FP4 of auto-round"),
        ({"quant_method": "gptq"}, ("weight_scale_2",), f"{UP}.weight_scale_2: found FP4 of gptq"),
        (None, ("weight_global_scale",), f"{UP}.weight_global_scale: found FP4 of a producer that no config names"),
        (None, ("comfy_quant",), f"{UP}.comfy_quant: found FP4 of a producer that no config names"),
        (None, ("w_outer_scale_denominator",),
         f"{UP}.w_outer_scale_denominator: found FP4 of a producer that no config names"),
    ],
)  # fmt: skip
def test_fp4_that_nobody_reads_is_a_problem(config, scales, found, tmp_path):
    expected = f"which is not read here, expected that of {', '.join(row.producer for row in FORMATS)}"
    assert problems(plain(tmp_path, config, *scales)) == [f"{found}, {expected}"]


@pytest.mark.parametrize(
    "config",
    [{"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, {"quant_method": "gptq", "bits": 4}, None],
)
def test_what_transformers_reads_itself_is_none(config, tmp_path):
    assert not problems(plain(tmp_path, config))
