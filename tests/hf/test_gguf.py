"""GGUF files with tensors in MXFP4 and NVFP4: what is loaded is what an independent decode of the file says."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("gguf", reason="needs gguf, which reads and writes such files")

from checkpoints import ggufs
from hf.loading import logits, read
from marlin_w4a16.__main__ import main
from marlin_w4a16.cli.gguf_inspection import inspect_gguf
from marlin_w4a16.hf import CheckpointError, report
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
}  # fmt: skip
CASES = [
    *((family, kind) for family in ("llama", "qwen3", "qwen3moe") for kind in ("MXFP4", "NVFP4")),
    ("llama", "mixed"), ("qwen2", "NVFP4"), ("qwen3moe", "mixed"), ("gpt-oss", "MXFP4"),
]  # fmt: skip


def expected(made: ggufs.Made, architecture: str) -> dict[str, np.ndarray]:
    """The state dict of transformers' class, in float64, of the values of a file."""
    found: dict[str, np.ndarray] = {}
    heads = {"attn_q": ggufs.CONFIG["num_attention_heads"], "attn_k": ggufs.CONFIG["num_key_value_heads"]}
    for name, value in made.values.items():
        layer, own, leaf = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(\w+)", name).groups()
        prefix = f"model.layers.{layer}." if layer else ""
        if own in heads and architecture == "llama":
            value = ggufs.unpermuted(value, heads[own])
        if own == "attn_sinks":
            found[f"{prefix}self_attn.sinks"] = value
        elif not own.endswith("_exps"):
            inner = "mlp.router" if architecture == "gpt-oss" and own == "ffn_gate_inp" else NAMES[own]
            found[f"{prefix}{inner}.{leaf}"] = value
        else:
            found[f"{prefix}{own}.{leaf}"] = value
    for layer in range(ggufs.CONFIG["num_hidden_layers"]):
        of = {k: found.pop(k) for k in list(found) if k.startswith(f"model.layers.{layer}.ffn_")}
        path = f"model.layers.{layer}.mlp.experts"
        gates, ups, downs = (
            {k.rpartition(".")[2]: v for k, v in of.items() if f"_{w}_" in k} for w in ("gate", "up", "down")
        )
        if architecture == "gpt-oss":
            for leaf, suffix in (("weight", ""), ("bias", "_bias")):
                both = np.stack([gates[leaf], ups[leaf]], 2).reshape(gates[leaf].shape[0], -1, *gates[leaf].shape[2:])
                turned = (both, downs[leaf]) if leaf == "bias" else (both.swapaxes(1, 2), downs[leaf].swapaxes(1, 2))
                found[f"{path}.gate_up_proj{suffix}"], found[f"{path}.down_proj{suffix}"] = turned
        elif of:
            found[f"{path}.gate_up_proj"] = np.concatenate([gates["weight"], ups["weight"]], 1)
            found[f"{path}.down_proj"] = downs["weight"]
    return found


def exact(made: ggufs.Made, architecture: str, config: Any) -> Any:
    """A dense model of transformers' own class with these values in float32."""
    from transformers import AutoModelForCausalLM

    config = type(config)(**{k: v for k, v in config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    state = {name: torch.from_numpy(value).float() for name, value in expected(made, architecture).items()}
    missing, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model


def difference(model: Any, other: Any) -> float:
    """The relative distance of logits."""
    ours, theirs = (logits(one) for one in (model, other))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("architecture, kind", CASES)
def test_it_is_what_its_bytes_are(architecture, kind, tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", architecture, kind)
    model = read(tmp_path, gguf_file="x.gguf")
    dense = exact(made, architecture, model.config)
    assert difference(model, dense) < 1e-5
    packed = [m for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)]
    assert len(packed) == {"qwen3moe": 11, "gpt-oss": 3}.get(architecture, 15)
    assert report(model).scheme.producer == "GGUF"
    model.dequantize()
    wanted = expected(made, architecture)
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(state[name].double().numpy(), value, rtol=1e-7, atol=0, msg=name)


def test_it_can_be_loaded_dense(tmp_path):
    from transformers import GgufConfig

    made = ggufs.write(tmp_path / "x.gguf", "llama", "NVFP4")
    model = read(tmp_path, gguf_file="x.gguf", quantization_config=GgufConfig(dequantize=True))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert difference(model, exact(made, "llama", model.config)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "qwen3moe", "mixed")
    model = read(tmp_path, gguf_file="x.gguf", dtype=dtype)
    assert model.dtype == dtype and isinstance(model.model.layers[0].self_attn.q_proj, PackedLinear)
    for leaf, name in (("o_proj", "attn_output"), ("v_proj", "attn_v")):
        linear = model.model.layers[1].self_attn.get_submodule(leaf)
        np.testing.assert_array_equal(linear.to_fp4().decode(torch.float64), made.values[f"blk.1.{name}.weight"])
    assert torch.equal(model.model.norm.weight, torch.from_numpy(made.values["output_norm.weight"]).to(dtype))


def test_a_device_map_that_spreads_the_model(tmp_path):
    """Linears are loaded by transformers then, in which they are as the file has them."""
    made = ggufs.write(tmp_path / "x.gguf", "llama", "mixed")
    model = read(tmp_path, gguf_file="x.gguf", device_map="auto")
    assert difference(model, exact(made, "llama", model.config)) < 1e-5
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 15


def test_an_embedding_in_fp4_is_dense_and_so_is_a_tied_head(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "MXFP4", embedding=True, head=False)
    model = read(tmp_path, gguf_file="x.gguf")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert difference(model, exact(made, "llama", model.config)) < 1e-5
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14


def test_a_router_and_a_norm_in_fp4_are_dense(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "qwen3moe", "NVFP4", odd=("ffn_gate_inp", "attn_norm"))
    model = read(tmp_path, gguf_file="x.gguf")
    assert difference(model, exact(made, "qwen3moe", model.config)) < 1e-5


def test_other_tensors_are_decoded_as_transformers_does(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "MXFP4", fp4="ffn", q8="attn")
    model = read(tmp_path, gguf_file="x.gguf")
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 7
    assert difference(model, exact(made, "llama", model.config)) < 1e-5


def test_sixteen_bits(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "qwen3moe", "MXFP4", fp4="_exps", f16="attn_[qk]", bf16="attn_[vo]")
    model = read(tmp_path, gguf_file="x.gguf")
    assert difference(model, exact(made, "qwen3moe", model.config)) < 1e-5


def test_experts_that_are_dense_in_one_layer(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "gpt-oss", "MXFP4", fp4=r"^0.*_exps")
    model = read(tmp_path, gguf_file="x.gguf")
    assert difference(model, exact(made, "gpt-oss", model.config)) < 1e-5
    assert [isinstance(layer.mlp.experts, PackedExperts) for layer in model.model.layers] == [True, False]


def test_a_file_without_fp4_is_left_to_transformers(tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", "llama", "MXFP4", fp4="none", head=False)
    model = read(tmp_path, gguf_file="x.gguf")
    assert report(model) is None and difference(model, exact(made, "llama", model.config)) < 1e-5


@pytest.mark.parametrize("architecture, kind", [("llama", "NVFP4"), ("llama", "mixed"), ("qwen3moe", "NVFP4")])
def test_it_is_saved_as_a_checkpoint_of_modelopt(architecture, kind, tmp_path):
    ggufs.write(tmp_path / "x.gguf", architecture, kind)
    model = read(tmp_path, gguf_file="x.gguf")
    model.save_pretrained(tmp_path / "saved")
    again = read(tmp_path / "saved")
    assert report(again).scheme.producer == "ModelOpt"
    assert torch.equal(logits(again), logits(model))


def test_gpt_oss_is_saved_as_openai_has_it(tmp_path):
    ggufs.write(tmp_path / "x.gguf", "gpt-oss", "MXFP4", head="dense")
    model = read(tmp_path, gguf_file="x.gguf")
    model.save_pretrained(tmp_path / "saved")
    again = read(tmp_path / "saved")
    assert report(again).scheme.producer == "OpenAI"
    assert torch.equal(logits(again), logits(model))


def test_gpt_oss_with_other_linears_in_fp4_is_not_saved(tmp_path):
    ggufs.write(tmp_path / "x.gguf", "gpt-oss", "MXFP4")
    model = read(tmp_path, gguf_file="x.gguf")
    with pytest.raises(CheckpointError, match="cannot be saved as a checkpoint of ModelOpt"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.safetensors"))


@pytest.mark.parametrize("architecture, kind", CASES)
def test_it_is_inspected(architecture, kind, tmp_path):
    made = ggufs.write(tmp_path / "x.gguf", architecture, kind)
    found = inspect_gguf(made.file, values=True)
    assert found.producer == "GGUF" and not found.problems
    assert found.formats.total() == {"qwen3moe": 33, "gpt-oss": 25}.get(architecture, 15)
    names = {"MXFP4": {"MXFP4 group 32"}, "NVFP4": {"NVFP4 group 16"}}
    assert set(found.formats) == names.get(kind, names["MXFP4"] | names["NVFP4"])
    assert {line.outcome for line in found.lines} == {"packed", "dense"}
    assert found.totals["bytes"] <= made.file.stat().st_size


def test_gpt_oss_has_its_rotary_embeddings(tmp_path):
    """Of whose metadata transformers 5.23 and 5.24 read the lengths of the keys."""
    ggufs.write(tmp_path / "x.gguf", "gpt-oss", "MXFP4", yarn=True)
    scaling = read(tmp_path, gguf_file="x.gguf").config.rope_parameters
    assert scaling == {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False, "rope_theta": 10000.0,
    }  # fmt: skip


def test_the_command_tells_of_a_file(tmp_path, capsys):
    file = ggufs.write(tmp_path / "x.gguf", "qwen3moe", "NVFP4", q8="attn", fp4="_exps", embedding=True).file
    assert main(["inspect", str(file)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{file}: GGUF NVFP4 (by x.gguf), ") and "25 FP4 linears (25 NVFP4 group 16)" in out
    assert re.search(r"blk\.\{0\.\.1\}\.attn_q +2 +128 x 128 +Q8_0 .* dense: decoded", out)
    assert re.search(r"token_embd +1 +208 x 128 +NVFP4 .* dense: decoded", out)
    assert main(["inspect", str(file), "--json"]) == 0
    file = ggufs.write(tmp_path / "y.gguf", "llama", "NVFP4", fp4="none", q8="attn", head="dense").file
    assert main(["inspect", str(file)]) == 0
    assert "nothing here is FP4" in (out := capsys.readouterr().out) and "GGUF is left to transformers" in out
