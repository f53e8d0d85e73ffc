"""A damaged checkpoint raises before any weight is read, and says what is wrong."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoints import damage
from checkpoints.formats import write, written
from hf.damaged import DOWN, LOADS, SINGLE, Damage, Q, load, of, of_model, of_quantisation
from hf.loading import choosing, loaded, logits
from marlin_w4a16.checkpoints.files import CheckpointError

NVFP4 = {"ModelOpt": "ModelOpt NVFP4", "compressed-tensors": "compressed-tensors nvfp4-pack-quantized"}


def test_the_error_is_a_value_error():
    from marlin_w4a16 import hf

    assert hf.CheckpointError is CheckpointError and issubclass(CheckpointError, ValueError)


def test_weights_of_a_whole_checkpoint_are_reached(monkeypatch):
    """What the fixture `error` relies on."""
    reached = []
    monkeypatch.setattr(LOADS, lambda *_, **__: reached.append(True))
    with pytest.raises(TypeError):
        load(written("modelopt-nvfp4", "llama"))
    assert reached


# Tensors

LEAVES = {
    "modelopt-nvfp4": ("weight", "weight_scale", "weight_scale_2"), "modelopt-mxfp4": ("weight", "weight_scale"),
    "modelopt-fp8": ("weight", "weight_scale"), "ct-nvfp4": ("weight_packed", "weight_scale", "weight_global_scale"),
    "ct-mxfp4a16": ("weight_packed", "weight_scale"),
}  # fmt: skip


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("name, leaf", [(name, leaf) for name, leaves in LEAVES.items() for leaf in leaves])
def test_a_missing_tensor(name, leaf, shards, damaged):
    (said,) = damaged(name, lambda folder: damage.drop(folder, f"{Q}.{leaf}"), shards=shards).split("\n")
    file, _, problem = said.partition(": ")
    found, _, expected = problem.partition(", expected ")
    assert file.endswith(".safetensors") and (file == SINGLE) == (not shards)
    assert found.startswith(f"{Q}.{leaf}: found no such tensor beside ") and expected.startswith("one (")


DAMAGES: list[tuple[str, Damage, str]] = [
    ("modelopt-nvfp4", lambda f: damage.cut_columns(f, of("weight_scale")),
     f"{of('weight_scale')}: found F8_E4M3 [96, 5], expected [n, k / 16] for codes U8 [96, 48]"),
    ("modelopt-nvfp4", lambda f: damage.alter(f, of("weight_scale"), lambda t: t[1:]),
     f"{of('weight_scale')}: found F8_E4M3 [95, 6], expected shape [96, 6]"),
    ("modelopt-nvfp4", lambda f: damage.cast(f, of("weight_scale"), torch.bfloat16),
     f"{of('weight_scale')}: found BF16 [96, 6], expected dtype F8_E4M3"),
    ("modelopt-nvfp4", lambda f: damage.cast(f, of("weight"), torch.int32),
     f"{of('weight')}: found I32 [96, 48], expected dtype U8"),
    ("modelopt-nvfp4", lambda f: damage.cast(f, of("weight_scale_2"), torch.float64),
     f"{of('weight_scale_2')}: found F64 [], expected dtype F32 or BF16 or F16"),
    ("modelopt-nvfp4", lambda f: damage.put(f, of("weight_global_scale"), torch.ones(1)),
     f"{of('weight_global_scale')}: found F32 [1], expected no such tensor in ModelOpt NVFP4"),
    ("modelopt-nvfp4", lambda f: damage.put(f, of("surplus"), torch.ones(3)),
     f"{of('surplus')}: found F32 [3], expected no such tensor in ModelOpt NVFP4"),
    ("modelopt-mxfp4", lambda f: damage.put(f, of("weight_scale_2"), torch.tensor(1.0)),
     f"{of('weight_scale_2')}: found F32 [], expected no such tensor in ModelOpt MXFP4"),
    ("modelopt-awq", lambda f: damage.cut_columns(f, "model.layers.0.self_attn.o_proj.pre_quant_scale"),
     "model.layers.0.self_attn.o_proj.pre_quant_scale: found BF16 [95], expected shape [96]"),
    ("ct-nvfp4", lambda f: damage.cut_columns(f, of("weight_packed")),
     f"{of('weight_scale')}: found F8_E4M3 [96, 6], expected [n, k / 16] for codes U8 [96, 47]"),
    ("ct-nvfp4", lambda f: damage.put(f, of("weight_global_scale"), torch.ones(96)),
     f"{of('weight_global_scale')}: found F32 [96], expected one element"),
    ("ct-nvfp4", lambda f: damage.put(f, of("weight_zero_point"), torch.ones(96, 6)),
     f"{of('weight_zero_point')}: found F32 [96, 6], expected no such tensor in {NVFP4['compressed-tensors']}"),
    ("ct-mxfp4a16", lambda f: damage.cast(f, of("weight_scale"), torch.float32),
     f"{of('weight_scale')}: found F32 [96, 3], expected dtype U8 or F8_E8M0"),
    # values
    ("modelopt-nvfp4", lambda f: damage.not_a_number(f, of("weight_scale")),
     f"{of('weight_scale')}: found NaN (byte 0x7f) at [95, 5], expected finite e4m3 scales"),
    ("ct-nvfp4", lambda f: damage.alter(f, of("weight_scale"), lambda t: with_byte(t, 0xFF)),
     f"{of('weight_scale')}: found NaN (byte 0xff) at [3, 2], expected finite e4m3 scales"),
    ("ct-mxfp4a16", lambda f: damage.not_a_number(f, of("weight_scale")),
     f"{of('weight_scale')}: found NaN (byte 0xff) at [95, 2], expected finite e8m0 scales"),
    ("modelopt-mxfp4", lambda f: damage.alter(f, of("weight_scale"), lambda t: with_byte(t, 0xFF)),
     f"{of('weight_scale')}: found NaN (byte 0xff) at [3, 2], expected finite e8m0 scales"),
    ("modelopt-nvfp4", lambda f: damage.not_a_number(f, of("weight_scale_2")),
     f"{of('weight_scale_2')}: found nan, expected finite numbers"),
    ("modelopt-fp8", lambda f: damage.not_a_number(f, of("weight_scale")),
     f"{of('weight_scale')}: found nan, expected finite numbers"),
    ("ct-nvfp4", lambda f: damage.put(f, of("weight_global_scale"), torch.zeros(1)),
     f"{of('weight_global_scale')}: found 0.0, expected finite numbers, not 0"),
]  # fmt: skip


def with_byte(scales: Tensor, byte: int) -> Tensor:
    scales.view(torch.uint8)[3, 2] = byte
    return scales


@pytest.mark.parametrize("name, change, problem", DAMAGES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_tensor_that_is_wrong(name, change, problem, damaged):
    assert damaged(name, change) == f"{SINGLE}: {problem}"


@pytest.mark.parametrize(
    "name, leaf, value, found",
    [("modelopt-nvfp4", "input_scale", torch.tensor(torch.inf), "inf, expected finite numbers"),
     ("ct-nvfp4", "input_global_scale", torch.zeros(1), "0.0, expected finite numbers, not 0")],
)  # fmt: skip
def test_scales_of_inputs_are_looked_at_where_these_are_quantised(name, leaf, value, found, tmp_path, error):
    folder = write(name, "llama", tmp_path)
    damage.put(folder, of(leaf), value)
    said = error(folder, quantization_config=choosing(name, activation_quant="keep"))
    assert said == f"{folder} cannot be loaded:\n  {SINGLE}: {of(leaf)}: found {found}"
    with torch.no_grad():
        assert torch.equal(logits(load(folder)), logits(loaded(name, "llama", torch.bfloat16)))


def test_every_problem_is_told(damaged):
    said = damaged("ct-nvfp4", lambda f: [damage.drop(f, f"{path}.weight_scale") for path in (Q, DOWN)])
    assert [line.split(":")[1].strip() for line in said.split("\n")] == [f"{Q}.weight_scale", f"{DOWN}.weight_scale"]


# Biases


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-mxfp4a16"])
@pytest.mark.parametrize(
    "family, change, problem",
    [
        ("llama-bias", lambda f: damage.drop(f, of("bias")),
         "found no such tensor, expected [96], since the model has"),
        ("llama-bias", lambda f: damage.cut_columns(f, of("bias")), "found BF16 [95], expected shape [96]"),
        ("llama", lambda f: damage.put(f, of("bias"), torch.ones(96)),
         "found a bias, expected none, since the model has"),
    ],
    ids=["missing", "shape", "surplus"],
)  # fmt: skip
def test_a_bias(name, family, change, problem, damaged):
    assert damaged(name, change, family=family).startswith(f"{SINGLE}: {Q}.bias: {problem}")


# Configs


def drop_all(folder: Path) -> None:
    """A layer has nothing but its bias."""
    leaves = (name for name in damage.load_file(folder / SINGLE) if name.startswith(f"{DOWN}."))
    for name in leaves:
        if not name.endswith(".bias"):
            damage.drop(folder, name)


@pytest.mark.parametrize("family", ["llama", "llama-bias"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_a_layer_without_tensors(name, family, damaged):
    label = NVFP4["ModelOpt" if name.startswith("modelopt") else "compressed-tensors"]
    expected = f"{DOWN}.weight: found no such tensor in any file, expected one ({label})"
    assert damaged(name, drop_all, family=family) == expected


@pytest.mark.parametrize("name, codes", [("modelopt-nvfp4", "weight"), ("ct-mxfp4a16", "weight_packed")])
def test_a_model_of_another_width(name, codes, damaged):
    said = damaged(name, of_model(intermediate_size=192)).split("\n")
    group = "NVFP4 group 16" if name.startswith("modelopt") else "MXFP4 group 32"
    problem = f"found {group} of 96 x 160, expected 96 x 192, as the model's {DOWN} has"
    assert len(said) == 6 and f"  {SINGLE}: {DOWN}.{codes}: {problem}" in said


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-mxfp4a16"])
def test_a_model_of_another_depth(name, damaged):
    said = damaged(name, of_model(num_hidden_layers=6)).split("\n")
    label = NVFP4["ModelOpt"] if name.startswith("modelopt") else "compressed-tensors mxfp4-pack-quantized"
    path = f"model.layers.{{2..5}}.{DOWN.removeprefix('model.layers.1.')}"
    assert f"  {path}.weight: found no such tensor in any file, expected one ({label}) (4 times)" in said
    norm = "model.layers.{2..5}.input_layernorm.weight"
    assert f"  {norm}: found no such tensor in any file, expected one of shape [96] (4 times)" in said
    assert len(said) == 9


@pytest.mark.parametrize(
    "name, change, problem",
    [
        ("modelopt-nvfp4", {"quant_algo": "NVFP4_NEW"},
         "and 13 more: found ModelOpt's NVFP4_NEW, expected one of NVFP4,"),
        ("modelopt-nvfp4", {"quant_algo": "INT4_AWQ"},
         "and 13 more: found ModelOpt's INT4_AWQ, expected one of NVFP4,"),
        ("modelopt-nvfp4", {"group_size": 64},
         "and 13 more: found ModelOpt's NVFP4 with group_size 64, expected one of"),
    ],
)  # fmt: skip
def test_a_config_that_belongs_to_another_checkpoint(name, change, problem, damaged):
    (said,) = damaged(name, of_quantisation(**change)).split("\n")
    assert problem in said


def test_groups_of_another_size(tmp_path, error):
    folder = write("ct-nvfp4", "llama", tmp_path)
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["group_size"] = 32
    damage.configure(folder, config_groups=groups)
    found = "found nvfp4-pack-quantized with group_size 32, expected group_size 16"
    assert error(folder).endswith(f"model.layers.0.mlp.down_proj and 13 more: {found}")


def test_a_config_without_an_algorithm(tmp_path, error):
    folder = write("modelopt-nvfp4", "llama", tmp_path)
    damage.configure(folder, quant_algo=None)
    where = "config.json: quantization_config.quant_algo"
    assert error(folder).startswith(f"{where}: found null, expected one of NVFP4, ")


@pytest.mark.parametrize("name", ["ct-nvfp4a16", "ct-nvfp4-fp8"])
def test_a_pattern_that_takes_too_long(name, tmp_path, error):
    folder, pattern = write(name, "llama", tmp_path), r"re:(.|.)*\d$"
    damage.configure(folder, ignore=[pattern])
    start = time.process_time()
    assert error(folder).startswith(
        f"config.json: quantization_config: what is ignored: found {pattern!r}, which takes"
    )
    assert time.process_time() - start < 2


def test_embeddings_are_not_supported(error):
    problem = "found NVFP4 group 16 of 208 x 96, expected a linear in the model, not Embedding"
    assert problem in error(written("ct-embedding", "llama"))


# Files


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_a_truncated_file(name, shards, tmp_path, error):
    folder = write(name, "llama", tmp_path, shards)
    file = damage.file_of(folder, of("weight_scale"))
    damage.truncate(folder, of("weight_scale"))
    said = error(folder)
    assert said.startswith(f"{file}: ") and said.endswith("expected a whole safetensors file: download it again")


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
@pytest.mark.parametrize("absolute", [False, True], ids=["..", "absolute"])
def test_an_index_that_leads_outside(name, shards, absolute, tmp_path, error):
    folder = write(name, "llama", tmp_path / "model", shards)
    outside = damage.lead_outside(folder, of("weight_scale"))
    given = str(outside.resolve()) if absolute else "../x.safetensors"
    damage.repoint(folder, {of("weight_scale"): given})
    assert error(folder) == f"{folder / damage.INDEX}: found the file {given!r}, expected one inside the folder"


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_a_shard_that_is_missing(name, tmp_path, error):
    folder = write(name, "llama", tmp_path, shards=True)
    file = damage.file_of(folder, of("weight_scale"))
    file.unlink()
    assert error(folder).startswith(f"{file}: ")


def test_weights_that_are_not_safetensors(tmp_path, error):
    folder = write("modelopt-nvfp4", "llama", tmp_path)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert error(folder) == f"{folder / 'pytorch_model.bin'}: found a .bin file, expected safetensors"


def test_a_state_dict_in_place_of_files(error):
    folder = written("modelopt-nvfp4", "llama")
    from transformers import AutoConfig

    said = error(None, config=AutoConfig.from_pretrained(folder), state_dict={}, auto="LlamaForCausalLM")
    assert "found a state dict, expected a checkpoint's files: its headers are read" in said
