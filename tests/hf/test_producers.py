"""Checkpoints of producers that transformers hands to their own packages: loaded four bits wide without those."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import packed
from checkpoints.models import FAMILIES
from hf.dense import tensors_of
from hf.loading import logits, read, same
from marlin_w4a16.cli.inspection import inspect
from marlin_w4a16.hf import CheckpointError, mlx_config, report

WRITERS = {
    "quark-mxfp4": ("Quark", packed.quark),
    "quark-mxfp4-rows": ("Quark", partial(packed.quark, rows=32)),  # of 48 rows, too
    "quark-nvfp4": ("Quark", partial(packed.quark, e4m3=True)),
    "auto-round-mxfp4": ("AutoRound", packed.auto_round),
    "auto-round-nvfp4": ("AutoRound", partial(packed.auto_round, e4m3=True)),
    "fp-quant-mxfp4": ("FP-Quant", packed.fp_quant),
    "fp-quant-nvfp4": ("FP-Quant", partial(packed.fp_quant, e4m3=True, side=16)),
    "torchao-mxfp4": ("torchao", packed.torchao),
    "torchao-nvfp4": ("torchao", partial(packed.torchao, e4m3=True)),
    "torchao-nvfp4-rows": ("torchao", partial(packed.torchao, e4m3=True, tiles=False)),
    "mlx-mxfp4": ("MLX", packed.mlx),
    "mlx-nvfp4": ("MLX", partial(packed.mlx, e4m3=True)),
}
CASES = [*((name, "llama") for name in WRITERS), ("quark-mxfp4", "qwen3moe"), ("quark-nvfp4", "glm4moe"),
         ("auto-round-nvfp4", "qwen3moe"), ("mlx-mxfp4", "qwen3moe"), ("mlx-nvfp4", "qwen3moe"),
         ("mlx-mxfp4", "llama-tied")]  # fmt: skip


def written(name: str, family: str, folder: Path):
    """The folder, and the model that it is exactly."""
    model = FAMILIES[family](dtype=torch.float32)
    config, layers = WRITERS[name][1]()
    exact = packed.write(model, folder, config, layers, stacked=name.startswith("mlx"))
    if name.startswith("torchao"):
        packed.headers(folder, tiles=not name.endswith("rows"))
    if name.startswith("mlx"):
        packed.as_mlx(folder)
    return folder, exact


def loaded(folder: Path, **options: Any) -> Any:
    """What transformers loads; folders of MLX are told by a config."""
    config = json.loads((folder / "config.json").read_text())
    mine = {"config": mlx_config(folder)} if "quantization" in config else {}
    return read(folder, **mine, **options)


@pytest.mark.parametrize("name, family", CASES)
def test_it_is_what_it_is_exactly_and_is_saved_bit_for_bit(name, family, tmp_path):
    folder, exact = written(name, family, tmp_path / "made")
    model = loaded(folder)
    assert torch.equal(logits(model).argmax(-1), logits(exact).argmax(-1))
    torch.testing.assert_close(logits(model), logits(exact), rtol=0, atol=1e-5)
    packed_paths = {layer.path for layer in report(model).layers if layer.outcome == "packed"}
    assert len(packed_paths) >= 9 and report(model).scheme.producer == WRITERS[name][0]
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(folder), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(same(after[key], tensor) for key, tensor in before.items())
    configs = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
