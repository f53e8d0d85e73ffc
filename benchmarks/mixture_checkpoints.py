"""Random FP4 checkpoints of the shapes of published mixtures of experts, in their layouts; tiny on a CPU."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig

from marlin_w4a16.checkpoints import files

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAVES = ("weight", "weight_scale", "weight_scale_2")  # of a linear by ModelOpt
STD = 0.02  # of dense weights; codes and scales are drawn so that their products are about as large
DENSE_PARTS = {
    "gpt-oss-20b": ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"),
    "qwen3-30b-a3b": ("lm_head", "model.layers.*.mlp.gate"),
}
State = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Mixture:
    """A published model: its config by layers, its quantization_config, and who writes its experts and linears."""

    config: Callable[[int], PreTrainedConfig]
    layers: int
    quantization: dict[str, Any]
    experts: Callable[[str, nn.Module], State]
    linear: Callable[[str, nn.Linear], State]


def gpt_oss(layers: int) -> PreTrainedConfig:
    """gpt-oss-20b."""
    hidden, experts, chosen, heads, vocabulary = (2880, 32, 4, 64, 201088) if DEVICE == "cuda" else (128, 8, 2, 4, 512)
    return GptOssConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        num_attention_heads=heads,
        num_key_value_heads=heads // 8 or 1,
        head_dim=64,
        sliding_window=128,
        dtype=torch.bfloat16,
    )


def qwen3(layers: int) -> PreTrainedConfig:
    """Qwen3-30B-A3B."""
    large = (2048, 768, 128, 8, 32, 151936)
    hidden, inner, experts, chosen, heads, vocabulary = large if DEVICE == "cuda" else (128, 64, 8, 2, 8, 512)
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * inner,
        moe_intermediate_size=inner,
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=chosen,
        norm_topk_prob=True,
        num_attention_heads=heads,
        num_key_value_heads=heads // 8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def codes(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE)


def dense(parameter: Tensor, name: str) -> Tensor:
    """Ones for norms, else of `STD`."""
    if parameter.ndim == 1 and name.endswith("weight"):
        return torch.ones(parameter.shape, device=DEVICE, dtype=torch.bfloat16)
    return torch.randn(parameter.shape, device=DEVICE, dtype=torch.bfloat16) * STD


def nvfp4(n: int, k: int, *experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and multiplier as NVIDIA ModelOpt stores them, of a linear or of many."""
    scales = torch.randint(0x60, 0x70, (*experts, n, k // 16), dtype=torch.uint8, device=DEVICE)
    multiplier = torch.full(experts, 2.0**-13, device=DEVICE)
    return codes(*experts, n, k // 2), scales.view(torch.float8_e4m3fn), multiplier


def stacked_mxfp4(path: str, module: nn.Module) -> State:
    """The experts of gpt-oss: blocks of 16 bytes and their scales, the rows of gates and of others interleaved."""
    state: State = {}
    for name in ("gate_up_proj", "down_proj"):
        experts, k, n = getattr(module, name).shape
        state[f"{path}.{name}_blocks"] = codes(experts, n, k // 32, 16)
        scales = torch.randint(118, 121, (experts, n, k // 32), dtype=torch.uint8, device=DEVICE)
        state[f"{path}.{name}_scales"] = scales
        state[f"{path}.{name}_bias"] = dense(getattr(module, f"{name}_bias"), "bias")
    return state


def separate_nvfp4(path: str, module: nn.Module) -> State:
    """Experts as ModelOpt exports them, each by itself."""
    experts, two_inner, hidden = module.gate_up_proj.shape
    shapes = {"gate_proj": (two_inner // 2, hidden), "up_proj": (two_inner // 2, hidden)}
    state: State = {}
    for name, (n, k) in {**shapes, "down_proj": (hidden, two_inner // 2)}.items():
        parts = [part.cpu() for part in nvfp4(n, k, experts)]
        for leaf, part in zip(LEAVES, parts, strict=True):
            state |= {f"{path}.{e}.{name}.{leaf}": one.clone() for e, one in enumerate(part)}
    return state


def linear_nvfp4(path: str, module: nn.Linear) -> State:
    return dict(zip((f"{path}.{leaf}" for leaf in LEAVES), nvfp4(*module.weight.shape), strict=True))


def linear_dense(path: str, module: nn.Linear) -> State:
    return {f"{path}.{name}": dense(parameter, name) for name, parameter in module.named_parameters()}


MIXTURES = {
    "gpt-oss-20b": Mixture(
        gpt_oss,
        24,
        {"quant_method": "mxfp4", "modules_to_not_convert": list(DENSE_PARTS["gpt-oss-20b"])},
        stacked_mxfp4,
        linear_dense,
    ),
    "qwen3-30b-a3b": Mixture(
        qwen3,
        48,
        {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "group_size": 16,
            "ignore": list(DENSE_PARTS["qwen3-30b-a3b"]),
        },
        separate_nvfp4,
        linear_nvfp4,
    ),
}


def shards(name: str, model: nn.Module) -> Iterator[State]:
    """The tensors of each layer, then the rest, on the CPU."""
    mixture = MIXTURES[name]
    *layers, rest = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.model.layers)] + [("", model)]
    for place, part in (*layers, rest):
        state: State = {}
        for below, module in part.named_modules():
            path = ".".join(filter(None, (place, below)))
            if not place and ".layers." in path:
                continue
            if hasattr(module, "gate_up_proj") and hasattr(module, "down_proj"):
                state |= mixture.experts(path, module)
            elif type(module) is nn.Linear and path != "lm_head":
                state |= mixture.linear(path, module)
            else:
                own = module.named_parameters(recurse=False)
                state |= {f"{path}.{leaf}": dense(parameter, leaf) for leaf, parameter in own}
        yield {tensor: value.cpu() for tensor, value in state.items()}


def write(folder: Path, name: str, layers: int) -> int:
    """Writes the checkpoint, one file a layer; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MIXTURES[name].config(layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    index, nbytes, tasks = {}, 0, []
    with ThreadPoolExecutor(4) as pool:
        for number, state in enumerate(shards(name, model), 1):
            file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
            index |= dict.fromkeys(state, file)
            nbytes += sum(tensor.nbytes for tensor in state.values())
            tasks.append(pool.submit(save_file, state, folder / file, {"format": "pt"}))
    for task in tasks:
        task.result()
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    architecture = {"architectures": [type(model).__name__], "quantization_config": MIXTURES[name].quantization}
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **architecture}))
    return nbytes
