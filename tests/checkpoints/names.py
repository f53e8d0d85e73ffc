"""Names of tensors in a checkpoint, where they are not those of the model's linears: written out by hand."""

from __future__ import annotations

import re

# As published, and as in the model: the parts between dots that stand for each other.
DEEPSEEK_V4 = {
    "embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm", "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base", "hc_head_scale": "model.hc_head.hc_scale",
}  # fmt: skip
DEEPSEEK_V4_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.gate": "mlp.gate",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    **{
        f"ffn.experts.{i}.{short}": f"mlp.experts.{i}.{long}"
        for i in range(4)
        for short, long in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items()
    },
}
LEAF = r"(?:\.(?:weight|scale|weight_scale|weight_scale_inv))?"


def renamed(name: str, model_type: str) -> str:
    """What a tensor or module of a checkpoint is called in the model, where the model has a linear for each expert."""
    if model_type == "nemotron_h":
        return re.sub(r"^backbone\.", "model.", name)
    if model_type == "mixtral":
        return name.replace(".block_sparse_moe.", ".mlp.")
    return exchanged(name, DEEPSEEK_V4, DEEPSEEK_V4_LAYER, "") if model_type == "deepseek_v4" else name


def published(name: str) -> str:
    """What a tensor of DeepSeek-V4 is called in its checkpoints: the inverse of `renamed`."""
    whole, layer = ({ours: theirs for theirs, ours in table.items()} for table in (DEEPSEEK_V4, DEEPSEEK_V4_LAYER))
    return exchanged(name, whole, layer, "model.").removeprefix("model.")


def exchanged(name: str, whole: dict[str, str], layer: dict[str, str], prefix: str) -> str:
    """A name by tables of all its parts but the last, which may be a leaf such as ``weight``."""
    head, table = "", whole
    if match := re.match(rf"{re.escape(prefix)}layers\.\d+\.", name):
        head, name, table = "model." + match[0].removeprefix("model."), name[match.end() :], layer
    leaf = "" if name in table else re.search(rf"{LEAF}$", name)[0]
    return head + table[name.removesuffix(leaf)] + leaf
