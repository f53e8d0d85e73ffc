"""Folders as mlx-lm writes them, without MLX."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.packed import Layers, Tensors, coded

NAMED = {"experts": "switch_mlp", "gate": "gate"}  # parts of a block of experts, in mlx-lm


def mlx(e4m3: bool = False, block: str = "mlp") -> tuple[dict[str, Any], Layers]:
    """mlx-lm: embeddings and heads in FP4, routers in eight bits, experts of nvfp4 with a scale for each of them."""
    config = {"group_size": 16 if e4m3 else 32, "bits": 4, "mode": "nvfp4" if e4m3 else "mxfp4"}
    routers = {f"model.layers.{i}.{block}.gate": {"group_size": 32, "bits": 8} for i in range(2)}

    def layers(path: str, dense: Tensor) -> tuple[Tensors, Tensor] | None:
        if path.endswith("mlp.gate"):
            return affine(dense)
        stacked = dense.ndim == 3
        made = [coded(one, e4m3, None if stacked else 1.0) for one in (dense if stacked else [dense])]
        parts = [torch.stack(parts) for parts in zip(*((one.low_first(), one.scales) for one in made), strict=True)]
        tensors = {leaf: part if stacked else part[0] for leaf, part in zip(("weight", "scales"), parts, strict=True)}
        tensors["weight"] = tensors["weight"].contiguous().view(torch.uint32)
        exact = torch.stack([one.exact() for one in made])
        if stacked and e4m3:
            amax = dense.float().abs().amax((1, 2))
            tensors["global_scale"] = amax
            factors = torch.tensor([one.factor for one in made]).double()
            exact = exact / factors.view(-1, 1, 1) * (amax / 2688).double().view(-1, 1, 1)
        return tensors, exact if stacked else exact[0]

    return {**config, **routers}, layers


def affine(dense: Tensor, group: int = 32) -> tuple[Tensors, Tensor]:
    """Eight bits, a factor and a bias for each group."""
    blocks = dense.double().unflatten(-1, (-1, group))
    least, most = blocks.amin(-1, keepdim=True).float(), blocks.amax(-1, keepdim=True).float()
    factor = (most - least) / 255
    codes = ((blocks - least) / factor).round().clamp(0, 255)
    words = codes.to(torch.uint8).flatten(-2).contiguous().view(torch.uint32)
    tensors = {"weight": words, "scales": factor.squeeze(-1), "biases": least.squeeze(-1)}
    return tensors, (codes * factor.double() + least.double()).flatten(-2)


def as_mlx(folder: Path, block: str = "mlp") -> None:
    """Names experts as mlx-lm does, in its blocks, and names the quantisation twice and without a method."""
    file, path = folder / "model.safetensors", folder / "config.json"
    tensors = {
        re.sub(r"\.mlp\.(experts|gate)\.", lambda m: f".{block}.{NAMED[m[1]]}.", name): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "mlx"})
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization": config["quantization_config"]}))
