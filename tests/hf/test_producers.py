"""Checkpoints of producers that transformers hands to their own packages: loaded four bits wide without those."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints import packed, packed_mlx
from checkpoints.models import FAMILIES
from hf.dense import tensors_of
from hf.loading import logits, read, same
from marlin_w4a16.cli.inspection import inspect
from marlin_w4a16.hf import CheckpointError, QuarkConfig, mlx_config, report

WRITERS = {
    "quark-mxfp4": ("Quark", packed.quark),
    "quark-mxfp4-rows": ("Quark", partial(packed.quark, rows=32)),  # of 48 rows, too
    "quark-nvfp4": ("Quark", partial(packed.quark, e4m3=True)),
    "auto-round-mxfp4": ("AutoRound", packed.auto_round),
    "auto-round-nvfp4": ("AutoRound", partial(packed.auto_round, e4m3=True)),
    "fp-quant-mxfp4": ("FP-Quant", packed.fp_quant),
    "fp-quant-nvfp4": ("FP-Quant", partial(packed.fp_quant, e4m3=True, side=16)),
    "torchao-mxfp4": ("torchao", packed.torchao),
    "torchao-nvfp4": ("torchao", partial(packed.torchao, e4m3=True)),
    "torchao-nvfp4-rows": ("torchao", partial(packed.torchao, e4m3=True, tiles=False)),
    "mlx-mxfp4": ("MLX", packed_mlx.mlx),
    "mlx-nvfp4": ("MLX", partial(packed_mlx.mlx, e4m3=True)),
}
CASES = [*((name, "llama") for name in WRITERS), ("quark-mxfp4", "qwen3moe"), ("quark-nvfp4", "glm4moe"),
         ("auto-round-nvfp4", "qwen3moe"), ("mlx-mxfp4", "qwen3moe"), ("mlx-nvfp4", "qwen3moe"),
         ("mlx-mxfp4", "mixtral"), ("mlx-mxfp4", "llama-tied")]  # fmt: skip


def written(name: str, family: str, folder: Path):
    """The folder, and the model that it is exactly."""
    model = FAMILIES[family](dtype=torch.float32)
    config, layers = WRITERS[name][1](**({"block": "block_sparse_moe"} if family == "mixtral" else {}))
    exact = packed.write(model, folder, config, layers, stacked=name.startswith("mlx"))
    if name.startswith("torchao"):
        packed.headers(folder, tiles=not name.endswith("rows"))
    if name.startswith("mlx"):
        packed_mlx.as_mlx(folder, "block_sparse_moe" if family == "mixtral" else "mlp")
    return folder, exact


def loaded(folder: Path, **options: Any) -> Any:
    """What transformers loads; folders of MLX are told by a config."""
    config = json.loads((folder / "config.json").read_text())
    mine = {"config": mlx_config(folder)} if "quantization" in config else {}
    return read(folder, **mine, **options)


@pytest.mark.parametrize("name, family", CASES)
def test_it_is_what_it_is_exactly_and_is_saved_bit_for_bit(name, family, tmp_path):
    folder, exact = written(name, family, tmp_path / "made")
    model = loaded(folder)
    assert torch.equal(logits(model).argmax(-1), logits(exact).argmax(-1))
    torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-5)
    packed_paths = {layer.path for layer in report(model).layers if layer.outcome == "packed"}
    assert len(packed_paths) >= 9 and report(model).scheme.producer == WRITERS[name][0]
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(same(after[key], tensor) for key, tensor in before.items())
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name, family", [(name, "llama") for name in WRITERS])
def test_it_is_inspected(name, family, tmp_path):
    folder, _ = written(name, family, tmp_path / "made")
    found = inspect(folder, values=True)
    assert found.producer == WRITERS[name][0] and not found.problems and not {"left", "refused"} & outcomes(found)
    assert set(found.formats) == {"NVFP4 group 16" if "nvfp4" in name else "MXFP4 group 32"}


def outcomes(found: Any) -> set[str]:
    return {line.outcome for line in found.lines}


@pytest.mark.parametrize("name", ["quark-mxfp4", "auto-round-nvfp4", "fp-quant-mxfp4", "torchao-nvfp4", "mlx-mxfp4"])
def test_it_can_be_dense(name, tmp_path):
    folder, exact = written(name, "llama", tmp_path / "made")
    model = loaded(folder)
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(model.state_dict(), exact.state_dict(), rtol=0, atol=0 if "fp-q" not in name else 1e-7)


def test_options_go_over_the_config(tmp_path):
    folder, exact = written("quark-mxfp4", "llama", tmp_path / "made")
    model = read(folder, quantization_config=QuarkConfig(dequantize=True))
    torch.testing.assert_close(model.state_dict(), exact.state_dict(), rtol=0, atol=0)
    kept = report(read(folder, quantization_config=QuarkConfig(activation_quant="keep")))
    assert "Quark quantises the inputs to fp4 (W4A4); this is run" in str(kept)
    with pytest.raises(CheckpointError, match="found activation_quant='refuse'"):
        read(folder, quantization_config=QuarkConfig(activation_quant="refuse"))


def test_layers_in_fp8_beside_fp4_are_decoded(tmp_path):
    """As AMD publishes them: attention in FP8, with a scale for the tensor or for each row."""
    config, layers = packed.quark()
    attention = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False}
    config["layer_quant_config"] = {
        "*self_attn.[qkv]_proj": {"weight": attention},
        "*self_attn*": {"weight": attention | {"qscheme": "per_tensor", "ch_axis": None}},
    }

    def mixed(path, dense):
        if ".self_attn." not in path:
            return layers(path, dense)
        scale = dense.abs().amax(-1 if "o_proj" not in path else None) / 448
        codes = (dense / (scale.unsqueeze(-1) if scale.ndim else scale)).to(torch.float8_e4m3fn)
        exact = codes.double() * (scale.double().unsqueeze(-1) if scale.ndim else scale.double())
        return {"weight": codes, "weight_scale": scale}, exact

    folder = tmp_path / "made"
    exact = packed.write(FAMILIES["llama"](dtype=torch.float32), folder, config, mixed)
    model = read(folder)
    torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-5)
    assert "and are FP8 again when saved (8 linears)" in str(report(model))
    model.save_pretrained(tmp_path / "again")
    after = tensors_of(tmp_path / "again")
    assert all(same(after[key], tensor) for key, tensor in tensors_of(folder).items())


def test_a_config_of_transformers_for_auto_round(tmp_path):
    """It goes before the class that is registered."""
    from transformers import AutoRoundConfig

    folder, exact = written("auto-round-mxfp4", "llama", tmp_path / "made")
    model = read(folder, quantization_config=AutoRoundConfig())
    torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-5)


def test_one_graph_gives_what_eager_gives(tmp_path, as_traced):
    """Rotations are part of it."""
    model = loaded(written("fp-quant-nvfp4", "llama", tmp_path / "made")[0])
    eager, traced = logits(model), torch.compile(model, backend="marlin_w4a16", fullgraph=True)
    torch.testing.assert_close(logits(traced), eager, rtol=0, atol=1e-5)


FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
REFUSED = {
    "quark, float scales": ("quark-mxfp4", {"global_quant_config": {"weight": FP4 | {"scale_format": "float32"}}},
                            "found Quark's fp4, qscheme per_group, group_size 32, scale_format float32"),
    "quark, blocks": ("quark-mxfp4", {"global_quant_config": {"weight": FP4 | {"block_size": [4, 64]}}},
                      "block_size [4, 64]"),
    "quark, unsigned scales": (
        "quark-nvfp4", {"global_quant_config": {"weight": FP4 | {"group_size": 16, "scale_format": "e5m3"}}}, "e5m3",
    ),
    "quark, another format": ("quark-mxfp4", {"layer_quant_config": {"*up_proj": {"weight": {"dtype": "int4"}}}},
                              "model.layers.0.mlp.up_proj and 1 more: found Quark's int4"),
    "quark, another number of rows": (
        "quark-mxfp4", {"global_quant_config": {"weight": FP4 | {"block_size": [16, 32]}}},
        "expected [n / 16, k / 32] for codes U8",
    ),
    "auto-round, eight bits": (
        "auto-round-mxfp4", {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}},
        "model.layers.0.mlp.up_proj: found AutoRound's mx_fp of 8 bits with group_size 32",
    ),
    "auto-round, E5M3": ("auto-round-nvfp4", {"extra_config": {".*up_proj": {"data_type": "nvfp4_v2"}}},
                         "unsigned E5M3 scales without a global scale"),
    "auto-round, rotations": ("auto-round-mxfp4", {"rotation_config": {"algorithm": "hadamard"}}, "rotation_config"),
    "fp-quant, another format": ("fp-quant-mxfp4", {"forward_dtype": "mxfp8"}, "found FP-Quant's mxfp8"),
    "fp-quant, another group": ("fp-quant-mxfp4", {"forward_dtype": "nvfp4"}, "expected [n, k / 16] for codes U8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case, tmp_path):
    name, entries, said = REFUSED[case]
    folder = packed.changed(written(name, "llama", tmp_path / "made")[0], **entries)
    with pytest.raises(CheckpointError) as raised:
        loaded(folder)
    found = inspect(folder)
    assert said in str(raised.value)
    assert any(said in str(problem) for problem in found.problems)


@pytest.mark.parametrize("name", WRITERS)
def test_damage_is_told_by_names(name, tmp_path):
    folder = written(name, "llama", tmp_path / "made")[0]
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    tensors = load_file(file)
    (scales,) = [key for key in tensors if key.startswith("model.layers.1.mlp.up_proj.") and key.endswith("scale")
                 and "global" not in key and "tensor_scale" not in key and "act" not in key] or [
        "model.layers.1.mlp.up_proj.scales"]  # fmt: skip
    save_file({key: t for key, t in tensors.items() if key != scales}, file, said)
    with pytest.raises(CheckpointError, match=f"{scales}: found no such tensor beside"):
        loaded(folder)
    save_file(tensors | {scales: tensors[scales][:, :1].contiguous()}, file, said)
    with pytest.raises(CheckpointError, match=f"{scales}: found .* expected .* for codes"):
        loaded(folder)


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "quark": ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int4"}}}, "Quark"),
    "auto-round": ({"quant_method": "auto-round", "bits": 4, "group_size": 128, "data_type": "int"}, "auto-round"),
    "fp_quant": ({"quant_method": "fp_quant", "forward_dtype": "nvfp4", "pseudoquantization": True}, "GPU"),
    "torchao": ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Nothing", "_data": {}}}}, "Nothing"),
}  # fmt: skip


@pytest.mark.parametrize("method", LEFT)
def test_what_is_not_fp4_goes_on_to_transformers(method, tmp_path):
    folder = written("quark-mxfp4", "llama", tmp_path / "made")[0]
    config, said = LEFT[method]
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    with pytest.raises((ImportError, ValueError, NotImplementedError), match=said) as raised:
        read(folder)
    assert not isinstance(raised.value, CheckpointError)


def test_a_config_of_transformers_gets_its_own_quantizer():
    from transformers import FPQuantConfig
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_fp_quant import FPQuantHfQuantizer

    made = auto.AutoHfQuantizer.from_config(FPQuantConfig(pseudoquantization=True), pre_quantized=False)
    assert type(made) is FPQuantHfQuantizer


def test_folders_of_mlx_need_a_config(tmp_path):
    folder = written("mlx-mxfp4", "llama", tmp_path / "made")[0]
    packed.changed(folder, mode="affine")
    with pytest.raises(CheckpointError, match=r"'mode': 'affine'.* expected that of MLX with mode mxfp4 or nvfp4"):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": None}))
        mlx_config(folder)
    with pytest.raises(CheckpointError, match=r"found no quantization in config\.json"):
        path.write_text(json.dumps({"model_type": "llama"}))
        mlx_config(folder)


def test_what_mlx_decodes_is_saved_only_as_it_was(tmp_path):
    model = loaded(written("mlx-nvfp4", "llama", tmp_path / "made")[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] += 1
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: found other values than the folder's"):
        model.save_pretrained(tmp_path / "again")


def test_e5m3_in_the_name_of_compressed_tensors_is_refused(tmp_path):
    folder = written("auto-round-nvfp4", "llama", tmp_path / "made")[0]
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}}
    packed.changed(folder, quant_method="compressed-tensors", format="nvfp4-e5m3-pack-quantized", config_groups=groups)
    found = inspect(folder)
    assert found.problems and all("NVFP4_E5M3" in problem.found for problem in found.problems)
    with pytest.raises(CheckpointError, match=r"found NVFP4_E5M3: unsigned E5M3 scales .* expected NVFP4"):
        read(folder)


@pytest.mark.parametrize("name, family", [("auto-round-nvfp4", "llama"), ("mlx-mxfp4", "llama")])
@pytest.mark.parametrize(
    "tensor, found",
    [(torch.ones(95), "found shape [95], expected [96], as the model has"),
     (torch.ones(96, dtype=torch.uint8), "found ")],
)  # fmt: skip
def test_dense_tensors_are_looked_at_though_others_load_some(tensor, found, name, family, tmp_path):
    folder, _ = written(name, family, tmp_path / "made")
    file, norm = folder / "model.safetensors", "model.layers.1.input_layernorm.weight"
    save_file({**load_file(file), norm: tensor}, file)
    with pytest.raises(CheckpointError) as raised:
        loaded(folder)
    (problem,) = inspect(folder).problems
    for said in (str(raised.value), str(problem)):
        assert f"model.safetensors: {norm}" in said and found in said


def test_packed_tensors_of_layers_that_the_config_leaves_dense_are_named(tmp_path):
    folder, _ = written("auto-round-nvfp4", "llama", tmp_path / "made")
    packed.changed(folder, extra_config={".*q_proj": {"bits": 16}})
    with pytest.raises(
        CheckpointError, match=r"q_proj\.weight: found no such tensor in any file, but \w+scale, expected"
    ):
        loaded(folder)
    assert inspect(folder).problems


def test_folders_of_mlx_are_held_against_their_model(tmp_path):
    folder, _ = written("mlx-mxfp4", "llama", tmp_path / "made")
    file = folder / "model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if not k.startswith("model.embed_tokens.")}, file)
    (problem,) = inspect(folder).problems
    assert str(problem).startswith("model.embed_tokens.weight: found no such tensor in any file")


def test_a_header_of_torchao_that_is_none(tmp_path):
    folder, _ = written("torchao-nvfp4", "llama", tmp_path / "made")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="expected a whole safetensors file: download it again"):
        loaded(folder)


@pytest.mark.parametrize("quant_type", [[], {}, {"default": {"_type": [], "_data": {}}}])
def test_a_config_of_torchao_that_its_package_does_not_expect(quant_type, tmp_path):
    pytest.importorskip("torchao")
    folder, _ = written("torchao-nvfp4", "llama", tmp_path / "made")
    packed.changed(folder, quant_type=quant_type)
    with pytest.raises(CheckpointError, match=r"^config\.json: quantization_config: found one that TorchAoConfig does"):
        loaded(folder)


def test_a_name_of_auto_round_that_nests_too_deeply_for_a_pattern(tmp_path):
    folder, exact = written("auto-round-nvfp4", "llama", tmp_path / "made")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]["extra_config"]
    packed.changed(folder, extra_config={**config, "(" * 5000: {"bits": 16}})
    torch.testing.assert_close(logits(loaded(folder)), logits(exact), rtol=0, atol=1e-5)


def test_mlx_in_which_nothing_is_fp4(tmp_path):
    folder, _ = written("auto-round-mxfp4", "llama", tmp_path / "made")
    packed.changed(folder, quant_method="mlx")
    with pytest.raises(
        CheckpointError, match=r"^config\.json: quantization_config: found no layer in FP4, expected one"
    ):
        loaded(folder)
    assert inspect(folder).problems


EMBEDDING = "model.embed_tokens"


@pytest.mark.parametrize(
    "leaf, change",
    [("scales", lambda t: t[:, :-1]), ("scales", lambda t: t[:-1]), ("scales", lambda t: t[..., None]),
     ("weight", lambda t: t[:, :-1]), ("weight", lambda t: t[0, 0]), ("scales", lambda t: t.float())],
)  # fmt: skip
def test_matrices_of_mlx_that_cannot_be_decoded(leaf, change, tmp_path):
    folder, _ = written("mlx-mxfp4", "llama", tmp_path / "made")
    file, name = folder / "model.safetensors", f"{EMBEDDING}.{leaf}"
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {EMBEDDING}\.weight: found .* in a mode of MLX"):
        loaded(folder)
    assert f"{EMBEDDING}.weight" in [problem.tensor for problem in inspect(folder).problems]


def test_metadata_of_torchao_are_named_with_their_file(tmp_path):
    folder, _ = written("torchao-nvfp4", "llama", tmp_path / "made")
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    save_file(load_file(file), file, {**said, "model.norm.weight": "x"})
    with pytest.raises(CheckpointError, match=r"^model\.safetensors: model\.norm\.weight: found the metadata 'x'"):
        loaded(folder)
