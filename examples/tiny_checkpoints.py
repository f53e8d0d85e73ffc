"""Tiny random mixtures of experts in the layouts in which gpt-oss, DeepSeek-V4 and Nemotron-H are published.

    python examples/tiny_checkpoints.py gpt_oss FOLDER

Each is a small model of the real class with random weights: transformers saves it under its published names, then the
weights that are published in FP4 and FP8 are quantised.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_w4a16 import FP4Weight, quantize_mxfp4, quantize_nvfp4

VOCABULARY, GROUP, BLOCK = 512, 16, 128
State = dict[str, Tensor]
Values = dict[str, object]


def gpt_oss(folder: Path) -> Path:
    """Stacked experts in MXFP4, by the names of openai/gpt-oss-20b."""
    config, state = saved(
        transformers.GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=96,
            num_hidden_layers=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            sliding_window=8,
            max_position_embeddings=4096,
            initializer_range=0.1,
        ),
        folder,
    )
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        weights = [quantize_mxfp4(matrix.T) for matrix in state.pop(name).float()]
        state[f"{name}_blocks"] = torch.stack([weight.codes for weight in weights]).unflatten(-1, (-1, 16))
        state[f"{name}_scales"] = torch.stack([weight.scales for weight in weights])
    dense = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return write(folder, config, state, {"quant_method": "mxfp4", "modules_to_not_convert": dense})


def deepseek_v4(folder: Path) -> Path:
    """Experts of their own in MXFP4, other linears in FP8 blocks, by the names of deepseek-ai/DeepSeek-V4-Flash.

    The first layer chooses its experts by a table of tokens.
    """
    experts, chosen = 8, 2
    config, state = saved(
        transformers.DeepseekV4Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            moe_intermediate_size=128,
            num_hidden_layers=3,
            layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            mlp_layer_types=["hash_moe", "moe", "moe"],
            compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            n_routed_experts=experts,
            num_experts_per_tok=chosen,
            num_attention_heads=4,
            head_dim=128,
            partial_rotary_factor=0.25,
            q_lora_rank=128,
            o_groups=2,
            o_lora_rank=128,
            index_n_heads=4,
            index_head_dim=64,
            index_topk=8,
            hc_mult=2,
            hc_sinkhorn_iters=4,
            sliding_window=16,
            max_position_embeddings=4096,
            num_nextn_predict_layers=0,
            initializer_range=0.06,
        ),
        folder,
    )
    renames = (
        (r"^model\.", ""),
        (r"^embed_tokens", "embed"),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"attn\.norm", "attn.kv_norm"),
    )
    for pattern, name in renames:
        state = {re.sub(pattern, name, old): tensor for old, tensor in state.items()}
    for name in [name for name in state if name.endswith("tid2eid")]:
        state[name] = torch.rand(VOCABULARY, experts).argsort(-1)[:, :chosen].clone()
    for path in list(linears(state, r"ffn\.experts\.\d+\.w[123]")):
        weight = quantize_mxfp4(state[f"{path}.weight"].float())
        state[f"{path}.weight"] = weight.codes.view(torch.int8)
        state[f"{path}.scale"] = weight.scales.view(torch.float8_e8m0fnu)
    for path in list(linears(state, r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|shared_experts\.w[123]")):
        state[f"{path}.weight"], state[f"{path}.scale"] = fp8_blocks(state[f"{path}.weight"].float())
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    return write(folder, {**config, "expert_dtype": "fp4"}, state, quantization)


def nemotron_h(folder: Path) -> Path:
    """Experts in NVFP4 and linears of Mamba in FP8, by the names of nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4."""
    config, state = saved(
        transformers.NemotronHConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            layers_block_type=["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=96,
            moe_shared_expert_intermediate_size=128,
            mamba_num_heads=8,
            mamba_head_dim=32,
            ssm_state_size=16,
            n_groups=2,
            chunk_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            initializer_range=0.1,
        ),
        folder,
    )
    layers: dict[str, Values] = {}
    for path in list(linears(state, r"mixer\.experts\.\d+\.(up|down)_proj")):
        state |= nvfp4_by_modelopt(path, quantize_nvfp4(state[f"{path}.weight"].float(), GROUP))
        layers[path] = {"quant_algo": "W4A16_NVFP4", "group_size": GROUP}
    for path in list(linears(state, r"mixer\.(in|out)_proj")):
        dense = state[f"{path}.weight"].float()
        scale = dense.abs().max() / 448
        state[f"{path}.weight"] = (dense / scale).to(torch.float8_e4m3fn)
        state[f"{path}.weight_scale"] = scale
        state[f"{path}.input_scale"] = torch.tensor(1.0)
        layers[path] = {"quant_algo": "FP8"}
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantized_layers": layers,
    }
    return write(folder, config, state, quantization)


TINY = {"gpt_oss": gpt_oss, "deepseek_v4": deepseek_v4, "nemotron_h": nemotron_h}


def nvfp4_by_modelopt(path: str, weight: FP4Weight) -> State:
    """The tensors of a linear as NVIDIA ModelOpt names them."""
    return {
        f"{path}.weight": weight.codes,
        f"{path}.weight_scale": weight.scales.view(torch.float8_e4m3fn),
        f"{path}.weight_scale_2": weight.multiplier[0].clone(),
    }


def fp8_blocks(dense: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes, and a scale that is a power of two for each block of 128 x 128."""
    rows, columns = (size // BLOCK for size in dense.shape)
    blocks = dense.view(rows, BLOCK, columns, BLOCK)
    scales = (blocks.abs().amax((1, 3), keepdim=True) / 448).log2().ceil().exp2()
    codes = (blocks / scales).to(torch.float8_e4m3fn).view(dense.shape)
    return codes, scales.view(rows, columns).to(torch.float8_e8m0fnu)


def linears(state: State, pattern: str) -> Iterator[str]:
    """Paths of the weights that match."""
    found = re.compile(rf".*\.({pattern})\.weight")
    return (name.removesuffix(".weight") for name in state if found.fullmatch(name))


def saved(config: transformers.PreTrainedConfig, folder: Path) -> tuple[Values, State]:
    """The config and the tensors, named as published, of a random model, that transformers writes."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder: Path, config: Values, state: State, quantization: Values) -> Path:
    """Replaces what `saved` wrote."""
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in TINY:
        raise SystemExit(f"usage: tiny_checkpoints.py {{{','.join(TINY)}}} FOLDER")
    print(TINY[sys.argv[1]](Path(sys.argv[2])))
