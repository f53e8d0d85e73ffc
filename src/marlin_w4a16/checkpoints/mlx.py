"""Folders of MLX (mlx-lm): ``quantization`` in config.json and no ``quant_method``; read in mlx-lm 0.32.

Codes lie in words of 32 bits. Of a mixture there is one tensor for each projection of all experts, ``switch_mlp``. All
that MLX can quantise it does, embeddings and routers too: what is no FP4 linear is decoded, see `decode`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.checkpoints import said
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layouts import Layout
from marlin_w4a16.checkpoints.scheme import LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FLOATS, FP4Storage, Part
from marlin_w4a16.kernels.fp4 import round_once
from marlin_w4a16.kernels.scale_bytes import ScaleKind, e8m0_values

MODES: dict[str, tuple[ScaleKind, int]] = {"mxfp4": ("e8m0", 32), "nvfp4": ("e4m3", 16)}
KINDS = {size: kind for kind, size in MODES.values()}
# Where transformers would have the first expert of a mixture.
RENAMED = (
    (r"block_sparse_moe\.switch_mlp\.gate_proj$", "block_sparse_moe.experts.0.w1"),
    (r"block_sparse_moe\.switch_mlp\.up_proj$", "block_sparse_moe.experts.0.w3"),
    (r"block_sparse_moe\.switch_mlp\.down_proj$", "block_sparse_moe.experts.0.w2"),
    (r"\.switch_mlp\.", ".experts.0."),
)
EXPERTS = "*.switch_mlp.*"
EMBEDDINGS = ("*embed_tokens", "*wte", "*word_embeddings", "*tok_embeddings")
Config = Mapping[str, Any]


def is_mlx(config: Config) -> bool:
    """Whether a quantisation config is one of MLX: it alone names no method."""
    return config.get("quant_method", "mlx") == "mlx" and {"group_size", "bits"} <= config.keys()


def is_fp4(config: Config) -> bool:
    """Whether any layer is FP4."""
    return any(str(layer.get("mode")) in MODES for layer in (config, *_own(config).values()))


def scheme(config: Config) -> Scheme:
    """What such a config says; layers in other modes are not told here, they are decoded."""
    targets: dict[str, FP4Storage | Mismatch | None] = {}
    for path, layer in _own(config).items():
        targets[path] = _storage(layer, stacked=".switch_mlp." in path)
    targets |= dict.fromkeys(EMBEDDINGS)
    targets |= {EXPERTS: _storage(config, stacked=True), LINEAR: _storage(config, stacked=False)}
    names = dict.fromkeys(str(layer.get("mode", "affine")) for layer in (config, *_own(config).values()))
    return Scheme("MLX", " + ".join(names), targets, decodes=True)


def decode(tensors: Mapping[str, Tensor], k: int, dtype: torch.dtype, name: str) -> Tensor:
    """The matrix ``[n, k]`` that some tensors by leaf are, rounded once: affine, in FP8 or in FP4.

    Raises:
        ValueError: their bits are none of 2, 4 and 8, or their scales are none that belong to these.
    """
    words, scales = tensors["weight"], tensors["scales"]
    bits, group = words.shape[-1] * 32 // k, k // scales.shape[-1]
    if "biases" in tensors and bits in (2, 4, 8):
        shifts = torch.arange(0, 8, bits, device=words.device)
        codes = (words.view(torch.uint8).unsqueeze(-1).int() >> shifts & (1 << bits) - 1).flatten(-2)
        factor, bias = (tensors[leaf].double().repeat_interleave(group, -1) for leaf in ("scales", "biases"))
        return round_once(codes * factor + bias, dtype)
    if scales.dtype == torch.uint8 and bits == 8 and group == 32:
        values = words.view(torch.float8_e4m3fn).double()
        return round_once(values * e8m0_values(scales).repeat_interleave(group, -1), dtype)
    if scales.dtype == torch.uint8 and bits == 4 and group in KINDS:
        return _fp4(KINDS[group], group, stacked=False).read(tensors, name).decode(dtype)
    raise ValueError(f"{name}: found {bits} bits with {scales.dtype} scales of {group}, expected a mode of MLX")


def columns(entries: Mapping[str, Entry], layer: Config) -> int:
    """The columns of a matrix in some tensors, by their headers and what the config says of its bits."""
    words, groups = ((entries[leaf].shape or (1,))[-1] for leaf in ("weight", "scales"))
    if entries["scales"].dtype == "U8":  # 4 bits in groups of 16 or 32, or 8 in groups of 32
        return words * (8 if words * 8 // max(groups, 1) in KINDS else 4)
    return words * 32 // max(said.number(layer, "bits", 4), 1)


def packed(others: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """What is quantised among tensors that are no FP4 linears: their entries by leaf, by path."""
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in others.items():
        path, _, leaf = name.rpartition(".")
        if f"{path}.scales" in others and leaf in ("weight", "scales", "biases", "global_scale"):
            found.setdefault(path, {})[leaf] = entry
    return {path: held for path, held in found.items() if "weight" in held and held["weight"].dtype == "U32"}


def misfit(entries: Mapping[str, Entry], shape: tuple[int, ...]) -> str | None:
    """What is found in place of a matrix of that shape that `decode` can read, if anything is."""
    told = ", ".join(f"{leaf} {entry}" for leaf, entry in entries.items())
    words, scales, biases = (entries.get(leaf) for leaf in ("weight", "scales", "biases"))
    if words is None or scales is None or len(shape) != 2 or len(words.shape) != 2 or len(scales.shape) != 2:
        return told
    (n, k), groups = shape, scales.shape[1]
    if (words.shape[0], scales.shape[0]) != (n, n) or not groups or k % groups or words.shape[1] * 32 % k:
        return told
    bits, group = words.shape[1] * 32 // k, k // groups
    if biases is not None:
        right = bits in (2, 4, 8) and biases.shape == scales.shape and {biases.dtype, scales.dtype} <= set(FLOATS)
    else:
        right = scales.dtype == "U8" and ((bits == 8 and group == 32) or (bits == 4 and group in KINDS))
    return None if right else told


def _own(config: Config) -> dict[str, Config]:
    """What is said of single layers; of those that are dense, False."""
    return {path: layer for path, layer in config.items() if isinstance(layer, Mapping)}


def _storage(layer: Config, stacked: bool) -> FP4Storage | Mismatch | None:
    mode = str(layer.get("mode", "affine"))
    if mode not in MODES:
        return Mismatch(f"MLX's {mode} of experts", "experts in mxfp4 or nvfp4") if stacked else None
    kind, size = MODES[mode]
    if (layer.get("bits", 4), layer.get("group_size", size)) != (4, size):
        found = f"MLX's {mode} of {layer.get('bits', 4)} bits with group_size {layer.get('group_size')}"
        return Mismatch(found, f"4 bits with group_size {size}")
    return _fp4(kind, size, stacked)


def _fp4(kind: ScaleKind, size: int, stacked: bool) -> FP4Storage:
    first = ("e",) if stacked else ()
    parts = (
        Part("weight", "codes", ("U32",), (*first, "n", "k/8")),
        Part("scales", "scales", ("U8",), (*first, "n", "k/g")),
        Part("global_scale", "amax", FLOATS, first, optional=True),
    )
    label = f"MLX {'mxfp4' if kind == 'e8m0' else 'nvfp4'}"
    return FP4Storage(label, kind, (size,), parts, None, ".", stacked, Layout("words"), RENAMED if stacked else ())
