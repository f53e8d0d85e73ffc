"""Tiny random models of real transformers classes, with weights that are hard on a reader of FP4.

Their widths are multiples of 32, not of 64, and heads share keys and values. Blocks of one weight differ in size by up
to ``2**17``, so that some E4M3 scales are subnormal; weights differ in size from each other, so that no two global
scales agree. Norms and biases are random too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTHS = {
    "vocab_size": 208,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


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


def tiny(config: str, dtype: torch.dtype = torch.bfloat16, zeros: bool = False, **choices: Any) -> PreTrainedModel:
    """The model of a config's class, the same at every call; ``zeros``: some blocks of the first layer are all zero."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        chosen = getattr(transformers, f"{config}Config")(**{"tie_word_embeddings": False, **WIDTHS, **choices})
        model = transformers.AutoModelForCausalLM.from_config(chosen)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
            else:
                draw(parameter, blocks_differ="embed_tokens" not in name)
    if zeros:
        model.model.layers[0].mlp.gate_proj.weight.data[::3, 32:64] = 0
    return model.to(dtype).eval()


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
}
