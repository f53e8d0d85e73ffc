"""The formats by name, and checkpoints of them, each written once in a run of the tests."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from filelock import FileLock

from checkpoints import compressed, modelopt, published
from checkpoints.compressed import LINEARS
from checkpoints.modelopt import FP8, Rule, nvfp4, rule
from checkpoints.models import FAMILIES, MIXTURES

Producer = Literal["ModelOpt", "compressed-tensors", "published"]
MLP, ATTENTION = ["re:.*mlp.*_proj$"], ["re:.*self_attn.*_proj$"]


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a quantised model.

    Attributes:
        name: unique; begins with the producer, or the model that it is published for.
        producer: whose code writes it, or that it is written here as published.
        write: called as ``write(model, folder, max_shard_size=...)``; the model is not to be used afterwards.
        about: what is special about it.
        family: the first class of models that it is written for.
    """

    name: str
    producer: Producer
    write: Callable[..., None]
    about: str
    family: str = "llama"

    def __str__(self) -> str:
        return self.name


def of_modelopt(
    name: str,
    about: str,
    preset: str,
    *rules: Rule,
    finish: Callable[[Path], None] | None = None,
    family: str = "llama",
) -> Format:
    """A preset of ModelOpt, with further rules; ``finish`` changes the files."""

    def write(model: Any, folder: Path, max_shard_size: str = "5GB") -> None:
        modelopt.write(model, folder, preset, *rules, max_shard_size=max_shard_size)
        if finish is not None:
            finish(folder)

    return Format(f"modelopt-{name}", "ModelOpt", write, about, family)


def of_compressed(name: str, about: str, *groups: compressed.Group, **choices: Any) -> Format:
    """Presets of compressed-tensors, each with its targets."""

    def write(model: Any, folder: Path, max_shard_size: str = "5GB") -> None:
        compressed.write(model, folder, *groups, **choices, max_shard_size=max_shard_size)

    return Format(f"ct-{name}", "compressed-tensors", write, about)


def as_published(name: str, about: str, write: Callable[..., None], **choices: Any) -> Format:
    """A layout of one model's authors."""
    family = "gptoss" if name == "gpt-oss" else "deepseekv4"
    return Format(name, "published", functools.partial(write, **choices), about, family)


MODELOPT = [
    of_modelopt("nvfp4", "with input_scale", "NVFP4_DEFAULT_CFG"),
    of_modelopt("w4a16", "weights only", "W4A16_NVFP4_CFG"),
    of_modelopt("group32", "E4M3 scales of groups of 32", "W4A16_NVFP4_CFG",
                rule("*_proj.weight_quantizer", nvfp4(group=32))),
    of_modelopt("head", "lm_head is quantised", "W4A16_NVFP4_CFG", rule("*lm_head.weight_quantizer", nvfp4())),
    of_modelopt("mlp", "ignore has a prefix and a star: the attention is dense", "NVFP4_MLP_ONLY_CFG"),
    of_modelopt("kv-fp8", "with k_scale and v_scale", "NVFP4_DEFAULT_CFG", rule("*[kv]_bmm_quantizer", FP8)),
    of_modelopt("kv-nvfp4", "kv_cache_scheme is a string", "NVFP4_DEFAULT_CFG", rule("*[kv]_bmm_quantizer", nvfp4())),
    of_modelopt("mixed", "FP8 attention, NVFP4 MLP, a dense down_proj", "NVFP4_DEFAULT_CFG",
                rule("*self_attn*_proj.weight_quantizer", FP8), rule("*self_attn*_proj.input_quantizer", FP8),
                rule("*layers.1.mlp.down_proj*")),
    of_modelopt("mixed-fp4", "NVFP4 with and without input_scale, groups of 16 and 32, dense", "NVFP4_DEFAULT_CFG",
                rule("*layers.1.*input_quantizer"), rule("*layers.1.mlp.down_proj.weight_quantizer", nvfp4(group=32)),
                rule("*layers.0.self_attn*")),
    of_modelopt("awq", "o_proj has a pre_quant_scale, in Gemma down_proj too", "NVFP4_AWQ_LITE_CFG"),
    of_modelopt("svdquant", "every linear has a pre_quant_scale and a low-rank part", "NVFP4_SVDQUANT_DEFAULT_CFG"),
    of_modelopt("mxfp4", "E8M0 scales, quant_algo in lower case", "MXFP4_DEFAULT_CFG"),
    of_modelopt("w4a8-nvfp4", "groups of 32, a factor of amax / 448", "W4A8_NVFP4_FP8_CFG"),
    of_modelopt("w4a8-mxfp4", "E8M0 scales", "W4A8_MXFP4_FP8_CFG"),
    of_modelopt("fp8", "nothing is FP4", "FP8_DEFAULT_CFG"),
]  # fmt: skip

COMPRESSED = [
    of_compressed("nvfp4a16", "weights only", ("NVFP4A16", LINEARS)),
    of_compressed("nvfp4", "with input_global_scale", ("NVFP4", LINEARS)),
    of_compressed("mxfp4a16", "weights only", ("MXFP4A16", LINEARS)),
    of_compressed("mxfp4", "inputs quantised, nothing stored for them", ("MXFP4", LINEARS)),
    of_compressed("mxfp4-fp8", "inputs in FP8, nothing stored for them", ("MXFP4XFP8", LINEARS)),
    of_compressed("head", "lm_head is quantised", ("NVFP4A16", LINEARS), ignore=()),
    of_compressed("embedding", "the embedding is quantised", ("NVFP4A16", [*LINEARS, "Embedding"])),
    of_compressed("kv", "with k_scale and v_scale of the attention", ("NVFP4A16", LINEARS), kv_cache=True),
    of_compressed("ignore-names", "ignore names each linear", ("NVFP4A16", LINEARS),
                  ignore=("lm_head", "re:.*self_attn.*", "model.layers.1.mlp.down_proj")),
    of_compressed("ignore-patterns", "ignore has a pattern", ("NVFP4A16", LINEARS), as_given=True,
                  ignore=("lm_head", "re:.*self_attn.*", "model.layers.1.mlp.down_proj")),
    of_compressed("target-names", "targets are names",
                  ("NVFP4A16", ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]),
                  as_given=True, ignore=()),
    of_compressed("two-groups", "two groups of one format", ("NVFP4A16", MLP), ("NVFP4", ATTENTION)),
    of_compressed("nvfp4-mxfp4", "mixed-precision, all FP4", ("NVFP4A16", MLP), ("MXFP4A16", ATTENTION)),
    of_compressed("nvfp4-fp8", "mixed-precision, FP8 attention", ("NVFP4A16", MLP), ("FP8_DYNAMIC", ATTENTION)),
    of_compressed("fp8", "nothing is FP4", ("FP8_DYNAMIC", LINEARS)),
]  # fmt: skip

# Nemotron-3 as published: mamba in FP8, experts in NVFP4, all else dense.
NEMOTRON = [
    rule("*mixer*_proj*"), rule("*conv1d*"),
    *(rule(f"*mixer.{name}_proj.{of}_quantizer", FP8) for name in ("in", "out") for of in ("weight", "input")),
    *(rule(f"*experts*{of}_quantizer", nvfp4()) for of in ("up_proj.weight", "down_proj.weight")),
    *(rule(f"*experts*{of}_quantizers*", nvfp4()) for of in ("up_proj_weight", "down_proj_weight")),
]  # fmt: skip
MODELOPT_EXPERTS = [
    of_modelopt("nemotron", "FP8 mamba, NVFP4 experts, dense attention and latents", "W4A16_NVFP4_CFG", *NEMOTRON,
                finish=modelopt.name_layers, family="nemotronh"),
    of_modelopt("nemotron-0.47", "the same with marks of ModelOpt 0.47 in the names of its config",
                "W4A16_NVFP4_CFG", *NEMOTRON, family="nemotronh"),
]  # fmt: skip
PUBLISHED = [
    as_published("gpt-oss", "MXFP4 stacks, gate and up interleaved, biases", published.write_gpt_oss),
    as_published("deepseek-v4", "MXFP4 experts, FP8 linears, E8M0 scales", published.write_deepseek_v4),
    as_published("deepseek-v4.1", "expert_dtype in the quantisation config", published.write_deepseek_v4, inside=True),
    as_published("deepseek-v4-fp32", "E8M0 scales held as float32", published.write_deepseek_v4, dtype=torch.float32),
    as_published("deepseek-v4-inv", "scales are weight_scale_inv, in float32", published.write_deepseek_v4,
                 leaf="weight_scale_inv", dtype=torch.float32),
    as_published("deepseek-v4-weight-scale", "scales of experts are weight_scale", published.write_deepseek_v4,
                 leaf="weight_scale"),
]  # fmt: skip

FORMATS: dict[str, Format] = {made.name: made for made in [*MODELOPT, *COMPRESSED, *MODELOPT_EXPERTS, *PUBLISHED]}
store = Path()  # where checkpoints lie: conftest.py says it
# For parametrised tests: every format of one family, and the main formats of every family without experts.
DENSE_FAMILIES = [name for name in FAMILIES if name not in MIXTURES]
MAIN = ["modelopt-nvfp4", "modelopt-w4a16", "modelopt-awq", "ct-nvfp4a16", "ct-nvfp4", "ct-mxfp4a16"]
CASES = [(made.name, "llama") for made in [*MODELOPT, *COMPRESSED]]
CASES += [(name, family) for name in MAIN for family in DENSE_FAMILIES[1:]]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random numbers of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@functools.cache
def export(name: str, family: str, shards: bool, dtype: torch.dtype) -> Path:
    packages = {"ModelOpt": "modelopt", "compressed-tensors": "compressed_tensors", "published": "transformers"}
    pytest.importorskip(packages[FORMATS[name].producer])
    folder = store / f"{name}-{family}-{str(dtype)[6:]}{'-shards' * shards}"
    with FileLock(f"{folder}.lock"), undisturbed():
        if not folder.exists():
            unfinished = Path(f"{folder}.unfinished")
            FORMATS[name].write(FAMILIES[family](dtype=dtype), unfinished, max_shard_size="60KB" if shards else "5GB")
            unfinished.rename(folder)
    return folder


def written(name: str, family: str, shards: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder of a checkpoint, written at the first call of any worker: for all to read, for none to change."""
    return export(name, family, shards, dtype)


def write(name: str, family: str, folder: Path, shards: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A copy of that checkpoint in a folder, to be changed at will."""
    return Path(shutil.copytree(export(name, family, shards, dtype), folder, dirs_exist_ok=True))
