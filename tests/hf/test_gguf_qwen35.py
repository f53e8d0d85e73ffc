"""GGUF files of Qwen3.5, which transformers reads by conversions: heads of linear attention lie in another order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("gguf", reason="needs gguf, which reads and writes such files")
pytest.importorskip("transformers.integrations.gguf", reason="needs transformers 5.23, which reads qwen35")

from checkpoints import ggufs
from hf.loading import logits, read
from marlin_w4a16.cli.gguf_inspection import inspect_gguf
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear

H, HEADS, GROUPS, D, KEYS, VALUES, DK, DV, WIDE = 128, 4, 2, 32, 2, 4, 32, 64, 192  # widths of the model


def grouped(value: np.ndarray, size: int, skip: int = 0) -> np.ndarray:
    """Rows of value heads by keys, where the file has the first value of each key, then the second of each."""
    heads = value[skip:].reshape(VALUES // KEYS, KEYS, size, *value.shape[1:])
    return np.concatenate([value[:skip], heads.swapaxes(0, 1).reshape(-1, *value.shape[1:])])


def linear_attention(made: ggufs.Made, layer: int, kind: str, wanted: dict[str, np.ndarray]) -> None:
    """Tensors of a layer of linear attention."""
    at, path, both = f"blk.{layer}.", f"model.layers.{layer}.linear_attn.", 2 * KEYS * DK
    for name, own, rows, size, skip in (
        ("attn_qkv", "in_proj_qkv", both + VALUES * DV, DV, both), ("attn_gate", "in_proj_z", VALUES * DV, DV, 0),
        ("ssm_alpha", "in_proj_a", VALUES, 1, 0), ("ssm_beta", "in_proj_b", VALUES, 1, 0),
    ):  # fmt: skip
        made.fp4(f"{at}{name}.weight", (rows, H), kind, 0.125)
        wanted[f"{path}{own}.weight"] = grouped(made.values[f"{at}{name}.weight"], size, skip)
    made.fp4(f"{at}ssm_out.weight", (H, VALUES * DV), kind, 0.125)
    wanted[f"{path}out_proj.weight"] = grouped(made.values[f"{at}ssm_out.weight"].T, DV).T
    kernel, decay = made.rng.standard_normal((both + VALUES * DV, 4)), -made.rng.uniform(1, 8, VALUES)
    made.dense(f"{at}ssm_conv1d.weight", kernel * 0.3)
    made.dense(f"{at}ssm_a", decay)
    made.dense(f"{at}ssm_dt.bias", made.rng.standard_normal(VALUES))
    made.dense(f"{at}ssm_norm.weight", 1 + 0.1 * made.rng.standard_normal(DV))
    wanted[f"{path}conv1d.weight"] = grouped(made.values[f"{at}ssm_conv1d.weight"], DV, both)[:, None]
    wanted[f"{path}A_log"] = grouped(np.log(-made.values[f"{at}ssm_a"]), 1)
    wanted[f"{path}dt_bias"] = grouped(made.values[f"{at}ssm_dt.bias"], 1)
    wanted[f"{path}norm.weight"] = made.values[f"{at}ssm_norm.weight"]


def full_attention(made: ggufs.Made, layer: int, kind: str, wanted: dict[str, np.ndarray]) -> None:
    """Tensors of a layer of full attention."""
    at, path = f"blk.{layer}.", f"model.layers.{layer}.self_attn."
    for name, own, n, k in (
        ("attn_q", "q_proj", 2 * HEADS * D, H), ("attn_k", "k_proj", GROUPS * D, H),
        ("attn_v", "v_proj", GROUPS * D, H), ("attn_output", "o_proj", H, HEADS * D),
    ):  # fmt: skip
        made.fp4(f"{at}{name}.weight", (n, k), kind, 0.125)
        wanted[f"{path}{own}.weight"] = made.values[f"{at}{name}.weight"]
    for name in ("q_norm", "k_norm"):
        norm(made, f"{at}attn_{name}.weight", D, f"{path}{name}.weight", wanted)


def norm(made: ggufs.Made, name: str, width: int, own: str, wanted: dict[str, np.ndarray]) -> None:
    """One that is stored as w + 1."""
    made.dense(name, 1 + 0.1 * made.rng.standard_normal(width))
    wanted[own] = made.values[name] - 1


def mixture(made: ggufs.Made, layer: int, kind: str, wanted: dict[str, np.ndarray]) -> None:
    """Tensors of routed experts and a shared one."""
    at, path = f"blk.{layer}.", f"model.layers.{layer}.mlp."
    for which, shape in (("gate", (4, 64, H)), ("up", (4, 64, H)), ("down", (4, H, 64))):
        made.fp4(f"{at}ffn_{which}_exps.weight", shape, kind, 0.125)
        made.fp4(f"{at}ffn_{which}_shexp.weight", shape[1:], kind, 0.125)
        wanted[f"{path}shared_expert.{which}_proj.weight"] = made.values[f"{at}ffn_{which}_shexp.weight"]
    both = [made.values[f"{at}ffn_{which}_exps.weight"] for which in ("gate", "up")]
    wanted[f"{path}experts.gate_up_proj"] = np.concatenate(both, 1)
    wanted[f"{path}experts.down_proj"] = made.values[f"{at}ffn_down_exps.weight"]
    made.dense(f"{at}ffn_gate_inp.weight", made.rng.standard_normal((4, H)))
    made.dense(f"{at}ffn_gate_inp_shexp.weight", made.rng.standard_normal(H) * 0.1)
    wanted[f"{path}gate.weight"] = made.values[f"{at}ffn_gate_inp.weight"]
    wanted[f"{path}shared_expert_gate.weight"] = made.values[f"{at}ffn_gate_inp_shexp.weight"][None]


def write(file: Path, kind: str, experts: bool) -> tuple[ggufs.Made, dict[str, np.ndarray]]:
    """A file, and the state dict of transformers' class."""
    made, wanted = ggufs.Made(file, "qwen35moe" if experts else "qwen35"), dict[str, np.ndarray]()
    of_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} if experts else {}
    ggufs.described(made, {**ggufs.CONFIG, **of_experts, "intermediate_size": WIDE}, 208)
    arch = "qwen35moe" if experts else "qwen35"
    sizes = {"conv_kernel": 4, "state_size": DK, "group_count": KEYS, "time_step_rank": VALUES}
    for name, value in {**sizes, "inner_size": VALUES * DV}.items():
        made.writer.add_uint32(f"{arch}.ssm.{name}", value)
    made.writer.add_uint32(f"{arch}.full_attention_interval", 2)
    if experts:
        made.writer.add_uint32(f"{arch}.expert_shared_feed_forward_length", 64)
    made.writer.add_array(f"{arch}.rope.dimension_sections", [2, 1, 1, 0])
    made.writer.add_rope_dimension_count(8)
    made.dense("token_embd.weight", made.rng.standard_normal((208, H)))
    wanted["model.embed_tokens.weight"] = made.values["token_embd.weight"]
    made.fp4("output.weight", (208, H), kind, 0.125)
    wanted["lm_head.weight"] = made.values["output.weight"]
    norm(made, "output_norm.weight", H, "model.norm.weight", wanted)
    for layer, attention in enumerate((linear_attention, full_attention)):
        attention(made, layer, kind, wanted)
        for name, own in (("attn_norm", "input_layernorm"), ("post_attention_norm", "post_attention_layernorm")):
            norm(made, f"blk.{layer}.{name}.weight", H, f"model.layers.{layer}.{own}.weight", wanted)
        if experts:
            mixture(made, layer, kind, wanted)
        for which, shape in (("gate", (WIDE, H)), ("up", (WIDE, H)), ("down", (H, WIDE))) if not experts else ():
            made.fp4(f"blk.{layer}.ffn_{which}.weight", shape, kind, 0.125)
            name = f"model.layers.{layer}.mlp.{which}_proj.weight"
            wanted[name] = made.values[f"blk.{layer}.ffn_{which}.weight"]
    made.finish()
    return made, wanted


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("kind", ["MXFP4", "NVFP4"])
def test_it_is_what_its_bytes_are(kind, experts, tmp_path):
    from transformers import AutoModelForCausalLM

    made, wanted = write(tmp_path / "x.gguf", kind, experts)
    model = read(tmp_path, gguf_file="x.gguf")
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    dense = AutoModelForCausalLM.from_config(type(model.config)(**config)).float().eval()
    dense.load_state_dict({name: torch.from_numpy(value.copy()).float() for name, value in wanted.items()})
    ours, theirs = logits(model), logits(dense)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    found = [type(m) for m in model.modules() if isinstance(m, PackedLinear | PackedExperts)]
    # all but the projection whose columns lie in another order
    assert len(found) == 1 + 4 + 4 + (8 if experts else 6)
    assert type(model.model.layers[0].linear_attn.out_proj) is torch.nn.Linear
    assert not inspect_gguf(made.file, values=True).problems
    model.dequantize()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double().numpy(), wanted[name], rtol=1e-6, atol=1e-7, msg=name)
    model = read(tmp_path, gguf_file="x.gguf")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(read(tmp_path / "saved")), ours)
