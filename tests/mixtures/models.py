"""Tiny models of transformers with FP4 experts: the real classes, random weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from marlin_w4a16 import FP4Weight, quantize_mxfp4, quantize_nvfp4
from mixtures.experts import hold_fp4

COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes:
        name: of its classes in transformers, before ``Config`` and ``ForCausalLM``.
        experts: the class of its experts.
        activation: what a report calls it.
        settings: of its config, over `COMMON`.
        transposed: its weights are ``[experts, k, n]``.
        quantize: the format of its experts.
        mixtures: blocks of its two layers.
        config: the end of the name of its config.
        implementations: by which transformers may run its experts in one graph.
    """

    name: str
    experts: str
    activation: str
    settings: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    quantize: Callable[..., FP4Weight] = quantize_nvfp4
    mixtures: int = 2
    config: str = "Config"
    implementations: tuple[str | None, ...] = ("grouped_mm", "batched_mm")

    def __str__(self) -> str:
        return self.name

    def build(self, implementation: str | None = "grouped_mm", dtype: torch.dtype = torch.float32) -> nn.Module:
        """A random model whose experts hold FP4."""
        import transformers

        config = getattr(transformers, f"{self.name}{self.config}")(**COMMON | self.settings)
        config._experts_implementation = implementation
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name}ForCausalLM")(config).eval().to(dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        experts = [module for module in model.modules() if type(module).__name__ == self.experts]
        for module in experts:
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.randn(parameter.shape) * (1.0 if name.endswith("bias") else 0.2))
            hold_fp4(module, self.quantize, transposed=self.transposed)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape))
        return model


DEEPSEEK = {
    "head_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1}
FAMILIES = [
    Family("Qwen3Moe", "Qwen3MoeExperts", "silu(gate) * up",
           {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}),
    Family("Mixtral", "MixtralExperts", "silu(gate) * up", {"num_local_experts": 4}, quantize=quantize_mxfp4),
    Family("DeepseekV3", "DeepseekV3Experts", "silu(gate) * up",
           {**DEEPSEEK, **ROUTED, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}, mixtures=1),
    Family("Glm4Moe", "Glm4MoeExperts", "silu(gate) * up",
           {**ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}, mixtures=1),
    Family("GptOss", "GptOssExperts", "silu(gate <= 7, 1.702) * (up in +-7 + 1)",
           {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}, True, quantize_mxfp4),
    Family("NemotronH", "NemotronHExperts", "relu2(z)",
           {**ROUTED, "layers_block_type": ["moe", "full_attention", "moe"], "n_group": 1, "topk_group": 1,
            "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 32, "routed_scaling_factor": 5.0}),
    Family("DeepseekV4", "DeepseekV4Experts", "silu(gate <= 10) * up in +-10",
           {**ROUTED, "q_lora_rank": 32, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2,
            "index_head_dim": 16, "index_topk": 8, "mlp_layer_types": ["hash_moe", "moe"],
            "layer_types": ["sliding_attention"] * 2, "sliding_window": 32, "hc_mult": 2}, quantize=quantize_mxfp4),
    Family("Llama4", "Llama4TextExperts", "silu(gate) * up",
           {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}, True,
           config="TextConfig", implementations=(None,)),
]  # fmt: skip
