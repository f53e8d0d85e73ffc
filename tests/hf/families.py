"""Tiny models of classes whose FP4 checkpoints are published, stored as these are: names, config and layers in FP4."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf.by_hand import fp8, nvfp4
from hf.dense import exact
from hf.family_models import (
    HYBRID,
    LATENT,
    MOE,
    SMALL,
    VISION,
    deepseek_v4,
    gemma4,
    indexers,
    kimi,
    llama4,
    nemotron,
    qwen4_exp,
)  # fmt: skip

Rules = dict[str, str]  # by pattern of a path, the algorithm of ModelOpt; the first that matches counts


@dataclass(frozen=True, slots=True)
class Family:
    """A published checkpoint, small.

    Attributes:
        model: the class, in transformers.
        config: makes its config.
        rules: which weights are stored how; "" is dense.
        quantization: the quantisation config, given the stored layers by path.
        file: where that stands.
        one_by_one: stacks of experts are stored as ModelOpt writes them, a matrix for each.
        more: changes the tensors, and those that they stand for; returns entries of config.json.
        surplus: a pattern of tensors that the model does not have.
        names: patterns in the names that the class saves, and what the published files have in their place.
    """

    model: str
    config: Callable[[Any], Any]
    rules: Rules
    quantization: Callable[[Rules], dict[str, Any]]
    file: str = "config.json"
    one_by_one: bool = False
    more: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Any]] = field(default=lambda *_: {})
    surplus: str = "(?!)"
    names: Mapping[str, str] = field(default_factory=dict)

    def published(self, name: str) -> str:
        """The name in the published files."""
        for pattern, become in self.names.items():
            name = re.sub(pattern, become, name)
        return name


def of_all(algorithm: str, *ignore: str, key: str = "ignore") -> Callable[[Rules], dict[str, Any]]:
    """One algorithm, and what is ignored."""
    values = {"quant_algo": algorithm, "group_size": 16, "kv_cache_quant_algo": "FP8", key: list(ignore)}
    return lambda _: values


def of_each(**more: Any) -> Callable[[Rules], dict[str, Any]]:
    """Every layer by its path."""

    def made(layers: Rules) -> dict[str, Any]:
        named = {path: {"quant_algo": algorithm} for path, algorithm in layers.items()}
        return {"quant_algo": "MIXED_PRECISION", "quantized_layers": named, **more}

    return made


def compressed(_: Rules) -> dict[str, Any]:
    """As llm-compressor has it for Qwen3-Next."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "format": "nvfp4-pack-quantized"}
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"],
        "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def as_compressed(tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
    """ModelOpt's names become those of compressed-tensors, and the multiplier a divisor."""
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        path, factor = name.removesuffix(".weight_scale_2"), tensors.pop(name)
        tensors[f"{path}.weight_packed"] = tensors.pop(f"{path}.weight")
        tensors[f"{path}.weight_global_scale"] = divisor = (1 / factor.double()).float().reshape(1)
        dense[f"{path}.weight"] = (dense[f"{path}.weight"].double() / factor.double() / divisor.double()).float()
    return {}


def stacks(tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
    """Llama-4's experts as ModelOpt has them: in stacks of ``[experts, k / 2, n]``, with one global scale for all."""
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, columns, rows = tensors[name].shape
        stored, value = quantised(NVFP4, experts * rows, columns)
        for leaf in ("weight", "weight_scale"):
            bits = stored[leaf].view(torch.uint8).unflatten(0, (experts, rows)).mT.contiguous()
            stored[leaf] = bits.view(stored[leaf].dtype)
        dense[name] = value.unflatten(0, (experts, rows)).mT.contiguous()
        tensors |= {name: stored["weight"], **{f"{name}_{leaf}": stored[leaf] for leaf in stored if leaf != "weight"}}
    return {}


def ngrams(tensors: dict[str, Tensor], dense: dict[str, Tensor]) -> dict[str, Any]:
    """Qwen3.8's shards of an embedding are FP8 with one scale, and its MTP layer is no part of the class."""
    scale = torch.tensor([0.003]).bfloat16()
    shards = [name for name in tensors if "ngram_embedding.shard_" in name]
    for name in shards:
        tensors[name] = (torch.randn(tensors[name].shape) * 20).to(torch.float8_e4m3fn)
        dense[name] = (tensors[name].double() * scale.double()).float()
    tensors[f"{shards[0].partition('.shard_')[0]}.weight_scale"] = scale
    mtp, _ = fp8(64, 64, (128, 128))
    tensors |= {f"mtp.layers.0.mlp.experts.0.gate_proj.{leaf}": tensor for leaf, tensor in mtp.items()}
    return {}


EVERY, NVFP4 = "*", "NVFP4"
MLA = ["lm_head", *(f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("kv_b_proj", "q_a_proj"))]
OUTSIDE = {"*embed*": "", "*norm*": "", "*.gate": "", "*lm_head": "", "*router*": "", "*vision*": "", "*visual*": ""}
GATES = [f"model.layers.{layer}.mlp.gate" for layer in range(2)]
FAMILIES: dict[str, Family] = {
    "DeepSeek-V3.1": Family(
        "DeepseekV3ForCausalLM", lambda T: T.DeepseekV3Config(**LATENT),
        {**dict.fromkeys(MLA, ""), **OUTSIDE, EVERY: NVFP4}, of_all(NVFP4, *MLA, key="exclude_modules"),
        file="hf_quant_config.json",
    ),
    "GLM-5": Family(  # and its indexers, whose weights code of the model asks for their dtype
        "GlmMoeDsaForCausalLM", indexers, {**OUTSIDE, EVERY: NVFP4},
        of_all(NVFP4, "lm_head", "model.layers.1.mlp.gate"),
    ),
    "Gemma-4-26B-A4B": Family(
        "Gemma4ForConditionalGeneration", gemma4, {"*self_attn*": "", **OUTSIDE, EVERY: NVFP4},
        of_all(NVFP4, "lm_head", "model.vision_tower*", "model.embed_vision*", "*self_attn*", "*router*"),
        one_by_one=True,
    ),
    "Kimi-K2.5": Family(
        "Kimi_K25ForConditionalGeneration", kimi, {"*self_attn*": "", "*mm_projector*": "", **OUTSIDE, EVERY: NVFP4},
        of_all(NVFP4, "language_model.lm_head", "*vision_tower*", "*mm_projector*", "*self_attn*"),
        names={r"^language_model\.model\.blocks\.": "language_model.model.layers."},
    ),
    "Kimi-K2.6": Family(
        "Kimi_K25ForConditionalGeneration", kimi,
        {"*.layers.0.*": "", "*.blocks.0.*": "", "*self_attn*": "", "*shared_experts*": "", "*mm_projector*": "",
         **OUTSIDE, EVERY: NVFP4},
        of_all(NVFP4, "language_model.lm_head", "language_model.model.layers.0*", "*vision_tower*", "*mm_projector*",
               *(f"language_model.model.layers.1.{name}*" for name in ("mlp.shared_experts", "self_attn"))),
        file="hf_quant_config.json", names={r"^language_model\.model\.blocks\.": "language_model.model.layers."},
    ),
    "Qwen3-235B-A22B": Family(
        "Qwen3MoeForCausalLM", lambda T: T.Qwen3MoeConfig(**SMALL, **MOE, decoder_sparse_step=1),
        {**OUTSIDE, EVERY: NVFP4}, of_all(NVFP4, "lm_head", *GATES, key="exclude_modules"),
        file="hf_quant_config.json",
    ),
    "Nemotron-3-Nano": Family(
        "NemotronHForCausalLM", nemotron,
        {"*.2.mixer.*": "", "*.in_proj": NVFP4, "*.out_proj": NVFP4, "*expert*": NVFP4, EVERY: ""},
        of_all(NVFP4, "lm_head", *(f"backbone.layers.2.mixer.{name}_proj" for name in "qkvo"),
               "backbone.layers.0.mixer.conv1d", key="exclude_modules"),
        file="hf_quant_config.json",
    ),
    "GLM-5.1": Family(
        "GlmMoeDsaForCausalLM", indexers,
        {"*.layers.0.*": "", "*self_attn*": "", "*shared_experts*": "", **OUTSIDE, EVERY: NVFP4},
        of_all(NVFP4, "lm_head", "model.layers.0*", "model.layers.1.mlp.shared_experts*", "model.layers.1.self_attn*",
               key="exclude_modules"),
        file="hf_quant_config.json",
    ),
    "Gemma-4-26B-A4B by llm-compressor": Family(
        "Gemma4ForConditionalGeneration", gemma4, {"*self_attn*": "", **OUTSIDE, EVERY: NVFP4},
        lambda _: {**compressed(_), "ignore": ["lm_head", "re:.*vision.*", "re:.*self_attn.*", "re:.*router.*"]},
        one_by_one=True, more=as_compressed,
    ),
    "MiniMax-M2.5": Family(
        "MiniMaxM2ForCausalLM", lambda T: T.MiniMaxM2Config(**SMALL, num_local_experts=4, num_experts_per_tok=2,
                                                             rotary_dim=16),
        {"*self_attn*": "", **OUTSIDE, EVERY: NVFP4},
        of_all(NVFP4, "lm_head", *(f"model.layers.{i}.self_attn*" for i in range(2))),
    ),
    "Nemotron-3.5-Lightning": Family(
        "NemotronHForCausalLM", nemotron,
        {"*_proj_never": "", "*in_proj": "FP8", "*out_proj": "FP8", "*expert*": "W4A16_NVFP4", "lm_head": "W4A16_NVFP4",
         EVERY: ""},
        of_each(exclude_modules=["backbone.embeddings", "*conv1d", "lm_head*"]), file="hf_quant_config.json",
    ),
    "Qwen3.5-122B-A10B": Family(
        "Qwen3_5MoeForConditionalGeneration",
        lambda T: T.Qwen3_5MoeConfig(text_config={**HYBRID, **MOE, "shared_expert_intermediate_size": 32},
                                     vision_config=VISION, tie_word_embeddings=False),
        {"*.experts.*": NVFP4, EVERY: ""},
        of_all(NVFP4, "lm_head", "*linear_attn*", "*self_attn*", "*shared_expert*", "model.visual*"), one_by_one=True,
    ),
    "Qwen3.6-27B": Family(
        "Qwen3_5ForConditionalGeneration",
        lambda T: T.Qwen3_5Config(text_config=HYBRID, vision_config=VISION, tie_word_embeddings=False),
        {"*in_proj_qkv": "FP8", "*language_model*self_attn*_proj": "FP8", "*language_model*mlp*": "W4A16_NVFP4",
         "lm_head": "W4A16_NVFP4", EVERY: ""},
        of_each(ignore=["model.visual*", "mtp*"]),
    ),
    "Qwen3.8-Flash-Next": Family(
        "Qwen4ExpForCausalLM", qwen4_exp, {"*.experts.*": NVFP4, EVERY: ""},
        lambda layers: {"quant_algo": "MIXED_PRECISION", "ignore": ["lm_head"], "quantized_layers": {
            **{path.partition(".experts.")[0] + ".experts": {"quant_algo": NVFP4} for path in layers},
            "model.layers.0.ple.ple_embedding.ngram_embedding": {"quant_algo": "FP8"},
            "mtp.layers.0.mlp.experts": {"quant_algo": "FP8_PB_WO", "group_size": 128}}},
        one_by_one=True, more=ngrams, surplus=r"mtp\..*",
    ),
    "DeepSeek-V4-Flash": Family(
        "DeepseekV4ForCausalLM", deepseek_v4, {"*.experts.*": NVFP4, EVERY: ""},
        lambda layers: {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128],
                        "activation_scheme": "dynamic", "quant_algo": "MIXED_PRECISION", "moe_quant_algo": NVFP4,
                        "quantized_layers": {f"layers.{i}.ffn.experts": {"quant_algo": NVFP4} for i in range(2)},
                        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]},
        more=lambda *_: {"expert_dtype": "fp4"}, names={r"^model\.(?=layers|embed|norm)": ""},
    ),
    "Llama-4-Scout": Family(
        "Llama4ForCausalLM", llama4, {"*shared_expert*": NVFP4, EVERY: ""},
        of_all(NVFP4, "lm_head", "*self_attn*", "*router*"), more=stacks,
    ),
    "Qwen3-Next": Family(
        "Qwen3NextForCausalLM",
        lambda T: T.Qwen3NextConfig(**HYBRID, **MOE, shared_expert_intermediate_size=32, decoder_sparse_step=1),
        {"*shared_expert_gate": "", **OUTSIDE, EVERY: NVFP4}, compressed, more=as_compressed,
    ),
}  # fmt: skip


def write(family: Family, folder: Path, reference: Path) -> None:
    """Writes the checkpoint, and the dense one of what it holds."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family.model)(family.config(transformers)).float().eval()
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) * (0.08 if parameter.ndim > 1 else 0.3)
        model.save_pretrained(reference)
        held = load_file(reference / "model.safetensors")
        tensors = one_by_one(held) if family.one_by_one else dict(held)
        dense, layers = dict(tensors), dict[str, str]()
        for name in [name for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2]:
            path = name.removesuffix(".weight")
            algorithm = next((of for pattern, of in family.rules.items() if fnmatchcase(path, pattern)), "")
            if algorithm:
                stored, dense[name] = quantised(algorithm, *tensors.pop(name).shape)
                tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in stored.items()}
                layers[path] = algorithm
        more = family.more(tensors, dense)
    shutil.copytree(reference, folder, dirs_exist_ok=True)
    whole = json.loads((folder / "config.json").read_text())
    named = {family.published(path): algorithm for path, algorithm in layers.items()}
    said = {"quant_method": "modelopt", **family.quantization(named)}
    if family.file == "config.json":
        more["quantization_config"] = said
    else:
        (folder / family.file).write_text(json.dumps({"quantization": {**said, "quant_method": None}}))
    (folder / "config.json").write_text(json.dumps({**whole, **more}))
    save(folder, {family.published(name): tensor for name, tensor in tensors.items()})
    save(reference, stacked(dense, held))


def quantised(algorithm: str, rows: int, columns: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a random weight by leaf, and its exact value."""
    if algorithm == "FP8":
        stored, value = fp8(rows, columns, (rows, columns))
        return {**stored, "weight_scale": stored["weight_scale"].reshape(())}, value.float()
    stored = nvfp4(rows, columns)
    return stored, exact({f"x.{leaf}": tensor for leaf, tensor in stored.items()}, "x").float()


def one_by_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks of experts as a matrix for each expert and projection."""
    found = dict(tensors)
    for name, stack in tensors.items():
        path, _, leaf = name.rpartition(".")
        if not re.search(r"experts$", path) or stack.ndim != 3:
            continue
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for number, both in enumerate(found.pop(name)):
            for part, matrix in zip(leaves, both.chunk(len(leaves)), strict=True):
                found[f"{path}.{number}.{part}.weight"] = matrix
    return found


def stacked(tensors: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `one_by_one`."""
    found = {name: tensors[name] for name in like if name in tensors}
    for name, stack in like.items():
        if name in found:
            continue
        path, _, leaf = name.rpartition(".")
        leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        each = (torch.cat([tensors[f"{path}.{e}.{part}.weight"] for part in leaves]) for e in range(len(stack)))
        found[name] = torch.stack(list(each))
    return found


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    """One file."""
    kept = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
