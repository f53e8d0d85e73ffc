"""What the tests of damaged checkpoints share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from checkpoints import damage

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SINGLE = "model.safetensors"
LOADS = "transformers.modeling_utils.convert_and_load_state_dict_in_model"
Damage = Callable[[Path], Any]


def load(folder: Path, auto: str = "AutoModelForCausalLM", **options: Any) -> nn.Module:
    import transformers

    import marlin_w4a16.hf  # noqa: F401, registers

    return getattr(transformers, auto).from_pretrained(folder, **options)


def packed(model: nn.Module) -> dict[str, nn.Module]:
    from marlin_w4a16.hf.linear import CheckpointLinear

    return {path: module for path, module in model.named_modules() if isinstance(module, CheckpointLinear)}


def of(leaf: str) -> str:
    return f"{Q}.{leaf}"


def of_model(**changes: Any) -> Damage:
    """Entries of config.json itself."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def of_quantisation(**changes: Any) -> Damage:
    return lambda folder: damage.configure(folder, **changes)
