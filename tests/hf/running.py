"""Models that run: packed ones beside dense ones that compute the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import marlin_w4a16
from hf.test_experts import models
from marlin_w4a16.modules.packed_linear import PackedLinear
from mixtures.models import FAMILIES, Family

NEW = 8
# A Mamba-2 layer of NemotronH beside its attention and experts.
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 8}
LAYERS = {
    "NemotronH": {"layers_block_type": ["mamba", "moe", "full_attention", "mamba", "moe"], **MAMBA},
    "DeepseekV4": {"mlp_layer_types": ["hash_moe", "moe", "moe"], "layer_types": [
        "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"], "num_hidden_layers": 3},
}  # fmt: skip


def family(name: str, layers: int = 2) -> Family:
    """A family with so many layers, none like the other; hybrids have those of `LAYERS`."""
    found = next(f for f in FAMILIES if f.name == name)
    return replace(found, settings={**found.settings, **LAYERS.get(name, {"num_hidden_layers": layers})})


@torch.no_grad()
def pair(name: str, layers: int = 2, seed: int = 0, blocks: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module]:
    """A model with packed experts and linears, and the same with the exact weights, both in float32; ``blocks`` are the
    layers of a hybrid."""
    chosen = family(name, layers)
    if blocks:
        chosen = replace(chosen, settings={**chosen.settings, "layers_block_type": list(blocks)})
    dense, packed = models(chosen, seed)
    torch.manual_seed(seed)
    for path, module in dense.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight"):
            module.weight.mul_(4)
            packed.get_submodule(path).weight.copy_(module.weight)
    marlin_w4a16.quantize(packed, "nvfp4", progress=False)
    for path, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            dense.get_submodule(path).weight.copy_(module.to_fp4(path).decode(torch.float32))
    return packed, dense


@torch.no_grad()
def generate(model: nn.Module, input_ids: Tensor, **options: Any) -> list[list[int]]:
    """`NEW` greedy tokens after each prompt."""
    chosen = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids, **chosen)[:, input_ids.shape[1] :].tolist()


def batch(model: nn.Module, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """`NEW` greedy tokens after each prompt, by continuous batching; few sizes of batches and caches."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    sizes = {"num_blocks": 32, "max_batch_tokens": 16, "q_padding_interval_size": 16, "kv_padding_interval_size": 512}
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(
        prompts, generation_config=config, continuous_batching_config=ContinuousBatchingConfig(**sizes | options)
    )
    found = list(outputs.values())
    assert len(found) == len(prompts) and not any(output.error for output in found), found
    return [output.generated_tokens for output in found]
