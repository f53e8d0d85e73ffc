"""Checkpoints that compressed-tensors saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import PreTrainedModel

Group = tuple[str, list[str]]
LINEARS = ["Linear"]


def split_experts(model: nn.Module) -> None:
    """Gives each expert linears of its own, as llm-compressor does before it quantises."""
    for module in model.modules():
        if isinstance(fused := getattr(module, "experts", None), nn.Module) and hasattr(fused, "gate_up_proj"):
            mixtral = type(fused).__name__ == "MixtralExperts"
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            module.experts = nn.ModuleList()
            for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
                module.experts.append(nn.ModuleDict(zip(names, map(linear, (*gate_up.chunk(2), down)), strict=True)))


def linear(weight: Tensor) -> nn.Linear:
    """A linear that holds this weight."""
    module = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    module.weight.data = weight.detach().clone()
    return module


@torch.no_grad()
def calibrate(module: nn.Module, scheme: QuantizationScheme) -> None:
    """Sets the scales as the min-max observer of llm-compressor does, those of activations to some number."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if scheme.weights is not None:
        weight, scale = module.weight, module.weight_scale
        divisor = getattr(module, "weight_global_scale", None)
        if divisor is not None:
            divisor.copy_(generate_gparam(weight.min(), weight.max()))
        values = weight.reshape(*scale.shape, -1)
        scale.copy_(calculate_qparams(values.amin(-1), values.amax(-1), scheme.weights, divisor)[0])
    for name in ("input_global_scale", "input_scale", "k_scale", "v_scale"):
        if (found := getattr(module, name, None)) is not None:
            found.fill_(123.4 if "global" in name else 0.0123)


def scale_caches(model: PreTrainedModel) -> None:
    """Gives attention the scales of its cache where compressed-tensors has not.

    It (0.20.1) knows attention by ``past_key_values``, which transformers 5.24 calls ``cache``.
    """
    for module in model.modules():
        for name in ("k_scale", "v_scale"):
            if hasattr(module, "k_proj") and not hasattr(module, name):
                scale = torch.full((1,), 0.0123, dtype=model.dtype)
                module.register_parameter(name, nn.Parameter(scale, requires_grad=False))


def write(
    model: PreTrainedModel,
    folder: Path,
    *groups: Group,
    ignore: Sequence[str] = ("lm_head",),
    as_given: bool = False,
    kv_cache: bool = False,
    max_shard_size: str = "5GB",
) -> None:
    """Quantises targets by presets and saves; the model is not to be used afterwards.

    Args:
        groups: the name of a preset with its targets.
        as_given: the saved config is the one given; otherwise it is rebuilt from the model, and ``ignore`` names every
            linear that was left.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    split_experts(model)
    schemes = {f"group_{i}": preset_name_to_scheme(*group) for i, group in enumerate(groups)}
    cache = QuantizationArgs(num_bits=8, type="float", strategy="tensor", symmetric=True) if kv_cache else None
    config = QuantizationConfig(config_groups=schemes, ignore=list(ignore), kv_cache_scheme=cache)
    apply_quantization_config(model, config, show_progress=False)
    if kv_cache:
        scale_caches(model)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is not None:
            calibrate(module, scheme)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    if as_given:
        config.format = compressor.quantization_config.format
        compressor.quantization_config = config
    compressor.quantization_config.kv_cache_scheme = cache
    compressor.compress_model(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    compressor.update_config(folder)
