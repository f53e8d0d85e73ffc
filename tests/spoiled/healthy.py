"""Tiny healthy checkpoints of every producer, each with the dense model that it is exactly."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from checkpoints import packed, packed_mlx, published
from checkpoints.models import FAMILIES
from hf import families
from hf.dense import dense
from hf.families import NVFP4, OUTSIDE, SMALL, Family, as_compressed, compressed, of_all, of_each

TOKENS = torch.arange(3, 35).view(2, 16)


@dataclass(frozen=True, slots=True)
class Healthy:
    """A checkpoint that nothing is wrong with.

    Attributes:
        folder: where it lies; to be copied, not to be changed.
        model: in float32.
    """

    folder: Path
    model: nn.Module


def _llama(rules: dict[str, str], said: Callable[..., Any], **more: Any) -> Family:
    return Family("LlamaForCausalLM", lambda T: T.LlamaConfig(**SMALL), {**OUTSIDE, **rules}, said, **more)


_ALL = {"*": NVFP4}
_FAMILIES = {
    "modelopt": _llama(_ALL, of_all(NVFP4, "lm_head")),
    "hf_quant_config": _llama(_ALL, of_all(NVFP4, "lm_head", key="exclude_modules"), file="hf_quant_config.json"),
    "modelopt-mixed": _llama({"*self_attn*": "FP8", "*": NVFP4}, of_each(exclude_modules=["lm_head", "*embed*"])),
    "modelopt-experts": replace(families.FAMILIES["MiniMax-M2.5"], file="config.json"),
    "compressed-tensors": _llama(_ALL, compressed, more=as_compressed),
    "compressed-experts": replace(families.FAMILIES["Qwen3-Next"], more=as_compressed),
}
_PACKED: dict[str, tuple[str, Callable[[], Any]]] = {
    "quark": ("llama", packed.quark),
    "quark-nvfp4": ("llama", partial(packed.quark, e4m3=True)),
    "auto-round": ("llama", partial(packed.auto_round, e4m3=True)),
    "auto-round-mxfp4": ("qwen3moe", packed.auto_round),
    "fp-quant": ("llama", packed.fp_quant),
    "torchao": ("llama", partial(packed.torchao, e4m3=True)),
    "mlx": ("llama", packed_mlx.mlx),
    "mlx-experts": ("qwen3moe", partial(packed_mlx.mlx, e4m3=True)),
}
KINDS = (*_FAMILIES, *_PACKED, "gpt-oss")


@functools.cache
def healthy(kind: str) -> Healthy:
    """A kind of checkpoint, written at the first call."""
    root = _root()
    folder = root / kind
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return Healthy(folder, _written(kind, folder, root / f"{kind}-dense").eval())


def _written(kind: str, folder: Path, reference: Path) -> nn.Module:
    if kind in _FAMILIES:
        families.write(_FAMILIES[kind], folder, reference)
        cls = getattr(transformers, _FAMILIES[kind].model)
        return cls.from_pretrained(reference, dtype=torch.float32)
    if kind == "gpt-oss":
        published.write_gpt_oss(FAMILIES["gptoss"](dtype=torch.float32), folder)
        return dense(folder, torch.float32)
    family, make = _PACKED[kind]
    config, layers = make()
    made = packed.write(FAMILIES[family](dtype=torch.float32), folder, config, layers, stacked=kind.startswith("mlx"))
    if kind == "torchao":
        packed.headers(folder)
    if kind.startswith("mlx"):
        packed_mlx.as_mlx(folder)
    return made


@functools.cache
def _root() -> Path:
    held = tempfile.TemporaryDirectory(prefix="healthy-")
    _HELD.append(held)  # until the process ends
    return Path(held.name)


_HELD: list[Any] = []


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Of some tokens."""
    return model(TOKENS, use_cache=False).logits


def config_of(folder: Path) -> dict[str, Any]:
    """The model's."""
    return json.loads((folder / "config.json").read_text())
