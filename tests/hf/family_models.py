"""Configs of tiny models of the classes whose FP4 checkpoints are published; ``T`` is transformers."""

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **{name: value for name, value in SMALL.items() if name != "head_dim"}, "num_key_value_heads": 4, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
HYBRID = {
    **SMALL, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4,
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
    "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
}  # fmt: skip


def indexers(T: Any) -> Any:
    return T.GlmMoeDsaConfig(
        **LATENT, index_n_heads=4, index_head_dim=32, index_topk=64, pad_token_id=0, qk_head_dim=32
    )


def deepseek_v4(T: Any) -> Any:
    sparse = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}
    return T.DeepseekV4Config(
        **{**SMALL, "num_key_value_heads": 1, "head_dim": 64}, moe_intermediate_size=64, n_routed_experts=4,
        num_experts_per_tok=2, n_shared_experts=1, q_lora_rank=64, o_groups=2, o_lora_rank=32, index_n_heads=2,
        index_head_dim=32, index_topk=16, partial_rotary_factor=0.25, hc_mult=2, sliding_window=8,
        compress_rates=sparse, layer_types=[*sparse][::-1],
    )  # fmt: skip


def kimi(T: Any) -> Any:
    vision = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4}
    text = {**LATENT, "model_type": "deepseek_v3"}
    return T.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=64, tie_word_embeddings=False
    )


def llama4(T: Any) -> Any:
    experts = {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1}
    kinds = ["chunked_attention", "full_attention"]
    return T.Llama4TextConfig(**SMALL, **experts, interleave_moe_layer_step=1, layer_types=kinds)


def nemotron(T: Any) -> Any:
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8}
    return T.NemotronHConfig(
        **{**SMALL, "num_hidden_layers": 4}, **mamba, conv_kernel=4, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, n_group=1, topk_group=1,
        layers_block_type=["mamba", "moe", "attention", "moe"],
    )  # fmt: skip


def qwen4_exp(T: Any) -> Any:
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    ngram = {"ple_layer_ids": [1], "ple_embed_dim": 64, "heads_per_ngram": 2, "ngram_vocab_size_base": 50}
    ngram |= {"make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 4, "ngram_size": 3}
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64}
    sizes = {name: value for name, value in HYBRID.items() if name != "intermediate_size"}
    return Qwen4ExpTextConfig(
        **sizes, **MOE, **ngram, **indexer, indexer_compress_ratio=4, shared_expert_intermediate_size=32, hc_count=2,
        hc_lowrank=16, eos_token_id=2,
    )  # fmt: skip


def gemma4(T: Any) -> Any:
    text = {**SMALL, "tie_word_embeddings": True, "enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 16}
    text |= {"num_experts": 4, "moe_intermediate_size": 32, "hidden_size_per_layer_input": 0, "sliding_window": 8}
    text |= {"vocab_size_per_layer_input": 128, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "global_head_dim": 16}
    return T.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, tie_word_embeddings=True)
