"""Checkpoints in layouts that the authors of models publish: MXFP4 of gpt-oss, FP4 and FP8 of DeepSeek-V4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from checkpoints.names import published

if TYPE_CHECKING:
    from transformers import PreTrainedModel

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
BETWEEN = (E2M1[1:] + E2M1[:-1]) / 2
GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
DEEPSEEK_V4 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
IN_FP8 = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[..., K / 2]``, low nibble first, and E8M0 scales ``[..., K / 32]``, both bytes: OCP MX v1.0, 6.3."""
    blocks = weight.double().unflatten(-1, (-1, 32))
    exponent = blocks.abs().amax(-1, keepdim=True).log2().floor().clamp(-125, 127) - 2
    code = torch.bucketize((blocks.abs() / exponent.exp2()).contiguous(), BETWEEN) + 8 * blocks.signbit()
    code = code.flatten(-2).to(torch.uint8)
    return code[..., ::2] | code[..., 1::2] << 4, (exponent + 127).squeeze(-1).to(torch.uint8)


def fp8(weight: Tensor, side: int = 128) -> tuple[Tensor, Tensor]:
    """E4M3 codes and a power of two for each square block."""
    rows, columns = (-(-size // side) for size in weight.shape)
    blocks = [[part.abs().amax() for part in row.split(side, 1)] for row in weight.float().split(side, 0)]
    scale = (torch.tensor(blocks).view(rows, columns) / 448).log2().ceil().exp2()
    spread = scale.repeat_interleave(side, 0)[: len(weight)].repeat_interleave(side, 1)[:, : weight.shape[1]]
    return (weight.float() / spread).to(torch.float8_e4m3fn), scale


def write_gpt_oss(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> None:
    """As openai/gpt-oss-20b: the dense form is transposed, the packed one is not."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            codes, scales = mxfp4(tensor.transpose(1, 2))
            tensors |= {f"{name}_blocks": codes.unflatten(-1, (-1, 16)), f"{name}_scales": scales}
        else:
            tensors[name] = tensor
    save(model, folder, tensors, max_shard_size, quantization_config=GPT_OSS)


def write_deepseek_v4(
    model: PreTrainedModel,
    folder: Path,
    max_shard_size: str = "5GB",
    leaf: str = "scale",
    dtype: torch.dtype = torch.float8_e8m0fnu,
    inside: bool = False,
) -> None:
    """As deepseek-ai/DeepSeek-V4-Flash.

    Args:
        leaf: the name of scales.
        dtype: that of scales.
        inside: the quantisation config says what experts are (V4.1), not the model's.
    """
    tensors = {}
    for name, tensor in each_expert(model.state_dict()).items():
        path, _, last = published(name).rpartition(".")
        if ".experts." in path:
            codes, scales = mxfp4(tensor)
            tensors[f"{path}.weight"] = codes.view(torch.int8)
            tensors[f"{path}.{leaf}"] = scales.view(torch.float8_e8m0fnu).to(dtype)
        elif path.endswith(IN_FP8) and ".compressor." not in path:
            tensors[f"{path}.weight"], scales = fp8(tensor)
            tensors[f"{path}.{leaf if leaf != 'weight_scale' else 'weight_scale_inv'}"] = scales.to(dtype)
        else:
            tensors[published(name)] = tensor.to(torch.bfloat16) if last == "weight" else tensor
    fp4 = {"expert_dtype": "fp4"}
    config = {**DEEPSEEK_V4, **fp4} if inside else DEEPSEEK_V4
    save(model, folder, tensors, max_shard_size, quantization_config=config, **({} if inside else fp4))


def each_expert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a tensor for each projection of each expert."""
    found = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".experts"):
            found[name] = tensor
            continue
        for i, expert in enumerate(tensor):
            parts = expert.chunk(2) if leaf == "gate_up_proj" else [expert]
            names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            found |= {f"{path}.{i}.{p}.weight": part for p, part in zip(names, parts, strict=True)}
    return found


def save(model: PreTrainedModel, folder: Path, tensors: dict[str, Tensor], max_shard_size: str, **entries: Any) -> None:
    """Writes tensors and the model's config with further entries."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True)
    save_torch_state_dict({n: t.contiguous() for n, t in tensors.items()}, folder, max_shard_size=max_shard_size)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}, indent=2))
    model.generation_config.save_pretrained(folder)
