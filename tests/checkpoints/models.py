"""Tiny random models of real transformers classes, with weights that are hard on a reader of FP4.

Their widths are multiples of 32, not of 64, and heads share keys and values. Blocks of one weight differ in size by up
to ``2**17``, so that some E4M3 scales are subnormal; weights differ in size from each other, the gate, up and down
projection of each expert too, so that no two global scales agree. Norms and biases are random too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = {
    "vocab_size": 208, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 128,
}  # fmt: skip
FEW_OF_4 = {"num_experts_per_tok": 2, "moe_intermediate_size": 96}
EXPERTS = {**FEW_OF_4, "num_experts": 4, "num_local_experts": 4}
ROUTED = {**FEW_OF_4, "n_routed_experts": 4, "n_shared_experts": 1, "topk_group": 1, "routed_scaling_factor": 2.5}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 24,
          "head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 24, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
SPARSE = {"q_lora_rank": 64, "o_groups": 2, "o_lora_rank": 32, "index_n_heads": 2, "index_head_dim": 32,
          "index_topk": 16, "num_key_value_heads": 1, "head_dim": 64, "partial_rotary_factor": 0.25, "hc_mult": 2,
          "sliding_window": 8, "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
          "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"]}  # fmt: skip


@torch.no_grad()
def draw(weight: Tensor, blocks_differ: bool) -> None:
    """Fills a weight; blocks of 16 columns are ``2**4`` apart, some pairs of them ``2**15`` below the largest."""
    dense = torch.randn(weight.shape) * torch.empty(()).uniform_(0.7, 2.5) * weight.shape[-1] ** -0.5
    if blocks_differ:
        blocks = dense.unflatten(-1, (-1, 2, 16))
        ordinary, small = (torch.empty(*blocks.shape[:-1], 1).uniform_(*r).exp2() for r in ((-4, 0), (-17.5, -15)))
        largest = dense.abs().max() / blocks.abs().amax(-1, keepdim=True)
        is_small = torch.rand(*blocks.shape[:-2], 1, 1) < 1 / 16
        dense = (blocks * torch.where(is_small, largest * small, ordinary)).flatten(-3)
    weight.copy_(dense)


@torch.no_grad()
def draw_experts(stack: Tensor, parts: int, transposed: bool, interleaved: bool, gain: float) -> None:
    """Fills the weights of experts, each part of each expert (gate and up) on its own."""
    for expert in stack:
        rows = expert.T if transposed else expert
        for part in [rows[i::parts] for i in range(parts)] if interleaved else rows.chunk(parts):
            draw(part, blocks_differ=True)
            part.mul_(gain)


def fill(name: str, parameter: Tensor, transposed: bool, gain: float) -> None:
    """Gives a parameter its random numbers."""
    if "experts." in name and parameter.ndim == 3:
        both = name.endswith("gate_up_proj")
        draw_experts(parameter, 1 + both, transposed, interleaved=transposed, gain=gain if both else 1.0)
    elif parameter.ndim == 1 or name.endswith("bias"):
        parameter.data += 0.1 * torch.randn(parameter.shape)
    else:
        draw(parameter, blocks_differ="embed" not in name and parameter.shape[-1] % 32 == 0)


def fill_buffer(name: str, buffer: Tensor) -> None:
    """Gives a router's bias its random numbers, and a table of experts by tokens distinct experts."""
    if name.endswith("e_score_correction_bias"):
        buffer.copy_(0.1 * torch.randn(buffer.shape))
    elif name.endswith("tid2eid"):
        buffer.copy_(torch.rand(len(buffer), 4).argsort(-1)[:, : buffer.shape[1]])


def as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model in a dtype, but for what `from_pretrained` keeps in float32."""
    kept = {*(model._keep_in_fp32_modules_strict or ())} if dtype != torch.float32 else set()
    kept |= {*(model._keep_in_fp32_modules or ())} if dtype == torch.float16 else set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if any(re.search(k, name) for k in kept) else dtype)
    model.config.dtype = dtype
    return model


def tiny(
    config: str, dtype: torch.dtype = torch.bfloat16, zeros: bool = False, gain: float = 1.0, **choices: Any
) -> PreTrainedModel:
    """The model of a config's class, the same at every call.

    Args:
        zeros: some blocks of the first layer are all zero.
        gain: by how much the gate and up projections of experts are larger.
    """
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = getattr(transformers, f"{config}Config")(**{"tie_word_embeddings": False, **WIDTHS, **choices})
        model = transformers.AutoModelForCausalLM.from_config(chosen)
        for name, parameter in model.named_parameters():
            fill(name, parameter, transposed=config == "GptOss", gain=gain)
        for name, buffer in model.named_buffers():
            fill_buffer(name, buffer)
    if zeros:
        model.model.layers[0].mlp.gate_proj.weight.data[::3, 32:64] = 0
    return as_loaded(model, dtype).eval()


gemma3 = partial(tiny, "Gemma3Text", layer_types=["sliding_attention", "full_attention"], sliding_window=8)

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": partial(tiny, "Llama"),
    "llama-tied": partial(tiny, "Llama", tie_word_embeddings=True),
    "llama-bias": partial(tiny, "Llama", attention_bias=True, mlp_bias=True),
    "llama-zeros": partial(tiny, "Llama", zeros=True),
    "qwen2": partial(tiny, "Qwen2"),
    "qwen3": partial(tiny, "Qwen3"),
    "qwen3-tied": partial(tiny, "Qwen3", tie_word_embeddings=True),
    "mistral": partial(tiny, "Mistral"),
    "mistral-tied": partial(tiny, "Mistral", tie_word_embeddings=True),
    "gemma3": gemma3,
    "gemma3-tied": partial(gemma3, tie_word_embeddings=True),
    "qwen3moe": partial(tiny, "Qwen3Moe", **EXPERTS),
    "mixtral": partial(tiny, "Mixtral", **EXPERTS),
    "glm4moe": partial(tiny, "Glm4Moe", **ROUTED, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True),
    "deepseekv3": partial(tiny, "DeepseekV3", **ROUTED, **LATENT, first_k_dense_replace=1, n_group=2),
    "nemotronh": partial(
        tiny, "NemotronH", **{**ROUTED, "routed_scaling_factor": 5.0}, **MAMBA, moe_latent_size=64,
        moe_shared_expert_intermediate_size=160,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
    ),
    "gptoss": partial(
        tiny, "GptOss", **EXPERTS, gain=8.0, layer_types=["sliding_attention", "full_attention"], sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, eos_token_id=None, pad_token_id=None,
    ),
    "deepseekv4": partial(
        tiny, "DeepseekV4", **ROUTED, **SPARSE, gain=8.0, intermediate_size=96, mlp_layer_types=["hash_moe", "moe"],
    ),
}  # fmt: skip
MIXTURES = ["qwen3moe", "mixtral", "glm4moe", "deepseekv3", "nemotronh", "gptoss", "deepseekv4"]
