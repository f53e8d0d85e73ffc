"""A damaged checkpoint raises before any weight is read, and says what is wrong; other classes of a model load it."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import damage
from checkpoints.formats import write, written
from hf.loading import choosing, loaded, logits, same
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.hf import report

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SINGLE = "model.safetensors"
LOADS = "transformers.modeling_utils.convert_and_load_state_dict_in_model"
NVFP4 = {"ModelOpt": "ModelOpt NVFP4", "compressed-tensors": "compressed-tensors nvfp4-pack-quantized"}
Damage = Callable[[Path], Any]


def load(folder: Path, auto: str = "AutoModelForCausalLM", **options: Any) -> nn.Module:
    import transformers

    import marlin_w4a16.hf  # noqa: F401, registers

    return getattr(transformers, auto).from_pretrained(folder, **options)


def packed(model: nn.Module) -> dict[str, nn.Module]:
    from marlin_w4a16.hf.linear import CheckpointLinear

    return {path: module for path, module in model.named_modules() if isinstance(module, CheckpointLinear)}


@pytest.fixture
def error(monkeypatch) -> Callable[..., str]:
    """What is said of a folder that cannot be loaded; its weights are not reached."""

    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are loaded")

    def said(folder: Path, **options: Any) -> str:
        with monkeypatch.context() as patched, pytest.raises(CheckpointError) as caught:
            patched.setattr(LOADS, reached)
            load(folder, **options)
        return str(caught.value)

    return said


@pytest.fixture
def damaged(tmp_path, error) -> Callable[..., str]:
    """What is said of a checkpoint after some damage."""

    def said(name: str, *changes: Damage, family: str = "llama", shards: bool = False) -> str:
        folder = write(name, family, tmp_path / "model", shards)
        for change in changes:
            change(folder)
        head, _, problems = error(folder).partition(" cannot be loaded:\n  ")
        assert head == str(folder)
        return problems

    return said


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


@pytest.mark.parametrize("name", ["ct-nvfp4a16", "ct-nvfp4-fp8"])
def test_a_pattern_that_takes_too_long(name, tmp_path, error):
    folder, pattern = write(name, "llama", tmp_path), r"re:(.|.)*\d$"
    damage.configure(folder, ignore=[pattern])
    start = time.process_time()
    assert error(folder).startswith(
        f"config.json: quantization_config: what is ignored: found {pattern!r}, which takes"
    )
    assert time.process_time() - start < 2


def of(leaf: str) -> str:
    return f"{Q}.{leaf}"


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


def of_model(**changes: Any) -> Damage:
    """Entries of config.json itself."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def of_quantisation(**changes: Any) -> Damage:
    return lambda folder: damage.configure(folder, **changes)


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


def test_embeddings_are_not_supported(error):
    problem = "found NVFP4 group 16 of 208 x 96, expected a linear in the model, not Embedding"
    assert problem in error(written("ct-embedding", "llama"))


# Experts

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
STACK = "model.layers.1.mlp.experts.down_proj"
OF_DEEPSEEK = "layers.1.ffn.experts.2.w3"


def of_expert(leaf: str) -> str:
    return f"{EXPERT}.{leaf}"


def without(path: str) -> Damage:
    """All tensors whose names begin so are missing."""

    def change(folder: Path) -> None:
        names = [name for name in damage.load_file(folder / SINGLE) if name.startswith(path)]
        assert names
        for name in names:
            damage.drop(folder, name)

    return change


def regrouped(folder: Path) -> None:
    """One expert has scales of groups of 32 (of which the other half is lost)."""
    damage.alter(folder, of_expert("weight_scale"), lambda t: t[:, ::2])


EXPERTS: list[tuple[str, str, Damage, str]] = [
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.drop(f, of_expert("weight_scale")),
     f"{SINGLE}: {of_expert('weight_scale')}: found no such tensor beside weight, weight_scale_2, expected one ("),
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.drop(f, of_expert("weight_scale_2")),
     f"{SINGLE}: {of_expert('weight_scale_2')}: found no such tensor beside weight, weight_scale, expected one ("),
    ("ct-nvfp4a16", "qwen3moe", lambda f: damage.drop(f, of_expert("weight_global_scale")),
     f"{SINGLE}: {of_expert('weight_global_scale')}: found no such tensor beside "),
    ("gpt-oss", "gptoss", lambda f: damage.drop(f, f"{STACK}_scales"),
     f"{SINGLE}: {STACK}_scales: found no such tensor beside blocks, expected one ("),
    ("deepseek-v4", "deepseekv4", lambda f: damage.drop(f, f"{OF_DEEPSEEK}.scale"),
     f"{SINGLE}: {OF_DEEPSEEK}.scale: found no such tensor beside weight, expected one ("),
    ("modelopt-w4a16", "qwen3moe", without("model.layers.1.mlp.experts.2."), "found no FP4 tensors of expert 2"),
    ("ct-mxfp4a16", "deepseekv3", without(EXPERT), "found no FP4 tensors of expert 2"),
    ("gpt-oss", "gptoss", without(STACK + "_"), f"{STACK}: found no such tensor in any file"),
    ("gpt-oss", "gptoss", lambda f: damage.drop(f, f"{STACK}_bias"), f"{STACK}_bias: found no such tensor"),
    ("gpt-oss", "gptoss", lambda f: damage.cut_columns(f, f"{STACK}_bias"),
     f"{SINGLE}: {STACK}_bias: found BF16 [4, 95], expected shape [4, 96]"),
    ("ct-nvfp4a16", "qwen3moe", regrouped, f"{of_expert('weight_scale')}: found F8_E4M3 [96, 3], expected "),
    ("modelopt-w4a16", "qwen3moe", lambda f: [damage.alter(f, of_expert(leaf), lambda t: t[32:])
                                              for leaf in ("weight", "weight_scale")],
     f"{EXPERT}: found NVFP4 group 16 of 64 x 96"),
    ("gpt-oss", "gptoss", lambda f: [damage.alter(f, f"{STACK}_{leaf}", lambda t: t[:3])
                                     for leaf in ("blocks", "scales")],
     f"{STACK}: found 3 experts of 96 x 160, expected 4 of 96 x 160, as the model has"),
    ("deepseek-v4", "deepseekv4", lambda f: damage.alter(f, f"{OF_DEEPSEEK}.scale", lambda t: t.float()),
     f"{SINGLE}: {OF_DEEPSEEK}"),
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.not_a_number(f, of_expert("weight_scale")),
     f"{SINGLE}: {of_expert('weight_scale')}: found NaN (byte 0x7f) at [95, 5], expected finite e4m3 scales"),
    ("modelopt-w4a16", "qwen3moe", lambda f: damage.not_a_number(f, of_expert("weight_scale_2")),
     f"{SINGLE}: {of_expert('weight_scale_2')}: found nan, expected finite numbers"),
    ("gpt-oss", "gptoss", lambda f: damage.not_a_number(f, f"{STACK}_scales"),
     f"{SINGLE}: {STACK}_scales: found NaN (byte 0xff) at [3, 95, 4], expected finite e8m0 scales"),
    ("deepseek-v4-fp32", "deepseekv4", lambda f: damage.not_a_number(f, f"{OF_DEEPSEEK}.scale"),
     f"{SINGLE}: {OF_DEEPSEEK}.scale: found "),
    ("modelopt-w4a16", "qwen3moe", of_model(num_local_experts=5), "expected those of 5 experts, as the model has"),
    ("modelopt-w4a16", "qwen3moe", of_model(num_local_experts=3), "expected 3 experts, as the model has"),
    ("modelopt-w4a16", "qwen3moe", of_model(hidden_act="mish"),
     f"{SINGLE}: model.layers.{{0..1}}.mlp.experts: found experts that do not run as one op: what stands between the "
     "two products is no activation of the op: the nearest is silu(gate) * up: at gate "),
]  # fmt: skip


@pytest.mark.parametrize("name, family, change, problem", EXPERTS, ids=lambda v: v if isinstance(v, str) else "")
def test_experts_that_are_wrong(name, family, change, problem, damaged):
    assert problem in damaged(name, change, family=family)


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


@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-nvfp4"])
def test_a_tensor_that_only_the_index_has(name, tmp_path):
    folder = write(name, "llama", tmp_path, shards=True)
    damage.repoint(folder, {f"{Q}.other": damage.file_of(folder, of("weight_scale")).name})
    assert torch.equal(logits(load(folder)), logits(loaded(name, "llama", torch.bfloat16)))


def test_weights_that_are_not_safetensors(tmp_path, error):
    folder = write("modelopt-nvfp4", "llama", tmp_path)
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert error(folder) == f"{folder / 'pytorch_model.bin'}: found a .bin file, expected safetensors"


def test_a_state_dict_in_place_of_files(error):
    folder = written("modelopt-nvfp4", "llama")
    from transformers import AutoConfig

    said = error(None, config=AutoConfig.from_pretrained(folder), state_dict={}, auto="LlamaForCausalLM")
    assert "found a state dict, expected a checkpoint's files: its headers are read" in said


# Other classes of the same model


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


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("name", ["modelopt-nvfp4", "ct-mxfp4a16"])
def test_layers_that_the_model_does_not_have_are_told(name, auto, tmp_path):
    folder = write(name, "llama", tmp_path)
    of_model(num_hidden_layers=1)(folder)
    model = load(folder, auto)
    assert len(packed(model)) == 7
    (note,) = (told for told in report(model).notes if "not loaded" in told)
    assert re.fullmatch(r"model\.layers\.1\.\S+ and 6 more: not loaded, the model has no such layer", note)
