"""Spoils tensors, in files that are safetensors still; see `configs` for what a spoiler returns."""

from __future__ import annotations

import json
import math
import re
from random import Random

import torch

from spoiled.configs import ODD, Words
from spoiled.parts import Parts

DTYPES = (
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_GLOBAL = re.compile(r"weight_scale_2|weight_global_scale|_weight_per_tensor_scale|global_scale")
_SCALES = re.compile(r"[._](weight_scale|scales|_weight_scale)$")


def _weight(parts: Parts, rng: Random) -> tuple[str, list[str]]:
    """The path of a packed weight, and the names of its tensors."""
    found = parts.quantised()
    path = rng.choice(sorted(found) or [""])
    return path, found.get(path) or parts.names[:1]


def _words(*names: str) -> Words:
    """A refusal may name a tensor, its module or its layer's experts."""
    words = [word for name in names for word in (name, name.rpartition(".")[0]) if word]
    return tuple(dict.fromkeys([*words, *("experts." for word in words if "experts" in word or "switch_mlp" in word)]))


def dtype(parts: Parts, rng: Random) -> Words:
    name = rng.choice(_weight(parts, rng)[1] if rng.random() < 0.8 else parts.names)
    tensor, new = parts.tensor(name), rng.choice(DTYPES)
    if tensor.dtype == new or (tensor.is_floating_point() and new.itemsize > 1 and new.is_floating_point):
        new = torch.int32
    tensor = tensor.view(torch.int32) if tensor.dtype == torch.uint32 else tensor
    parts.put(name, tensor.float().to(new) if new.is_floating_point else tensor.float().nan_to_num().to(new))
    return _words(name)


def shape(parts: Parts, rng: Random) -> Words:
    """Rows or columns less or more, another number of axes, or no element."""
    name = rng.choice(_weight(parts, rng)[1] if rng.random() < 0.7 else parts.names)
    t = parts.tensor(name)
    ways = {
        "flat": lambda: t.reshape(-1), "more axes": lambda: t.unsqueeze(0), "none": lambda: t.new_zeros(0),
        "scalar": lambda: t.reshape(-1)[:1].reshape(()), "zeros": lambda: t.new_zeros((0, *t.shape)),
        "vector": lambda: t.new_zeros(7), "cut": lambda: t[..., :-1] if t.ndim else t.new_zeros(2),
        "rows": lambda: t[1:] if t.ndim else t.new_zeros(3), "last": lambda: t.unsqueeze(-1),
        "double": lambda: torch.cat([t.reshape(-1).view(torch.uint8)] * 2).view(t.dtype).view(2, *t.shape),
    }  # fmt: skip
    made = ways[rng.choice(sorted(ways))]()
    parts.put(name, made.clone())
    return _words(name)


def transposed(parts: Parts, rng: Random) -> Words:
    names = [name for _, some in sorted(parts.quantised().items()) for name in some if parts.tensor(name).ndim > 1]
    name = rng.choice(names or parts.names)
    tensor = parts.tensor(name)
    parts.put(name, tensor.mT.contiguous() if tensor.ndim > 1 else tensor)
    if tensor.ndim > 1 and tensor.shape[-1] == tensor.shape[-2]:
        parts.drop(name)
    return _words(name)


def lost(parts: Parts, rng: Random) -> Words:
    """Some tensors of a packed weight are missing."""
    _, names = _weight(parts, rng)
    gone = rng.sample(names, rng.choice([1, 1, 1, min(2, len(names)), len(names)]))
    parts.drop(*gone)
    return _words(*gone)


def surplus(parts: Parts, rng: Random) -> Words:
    """Tensors of nobody, or beside those of a packed weight."""
    path, names = _weight(parts, rng)
    new = rng.choice([
        f"{path}.weight_zero_point", f"{path}.weight_scale_2", f"{path}.weight_global_scale", f"{path}.bias",
        f"{path}.pre_quant_scale", f"{path}.weight_shape", f"{path}.weight", f"{path}.x", "x", "x.weight", "", ".",
        "model", "model.", f"{path}..weight", "model.layers.9.mlp.up_proj.weight", "model.layers.0.extra.weight_scale",
        "é.\u200b", f"{path}.input_scale", f"{path}.k_scale", "lm_head.bias", f"{names[0]}.{names[0]}", path,
    ])  # fmt: skip
    if new in parts.names:
        new = f"{new}_again"
    parts.put(new, rng.choice([torch.ones(()), torch.ones(3), parts.tensor(names[0]).clone(), torch.ones(0)]))
    return _words(new)


def dense(parts: Parts, rng: Random) -> Words:
    """In the place of a packed weight stands a dense one, of its shape or of another."""
    path, names = _weight(parts, rng)
    held = dict(parts.healthy.model.state_dict())
    like = held.get(f"{path}.weight")
    parts.drop(*names)
    if like is None or rng.random() < 0.5:
        parts.put(f"{path}.weight", torch.ones(5, 7))
        return _words(f"{path}.weight", *names)
    made = torch.randn(like.shape, generator=torch.Generator().manual_seed(rng.randrange(2**30))) * 0.05
    parts.put(f"{path}.weight", made)
    parts.values[f"{path}.weight"] = made
    return _words(f"{path}.weight", *names)


def nan_scale(parts: Parts, rng: Random) -> Words:
    """A byte of block scales is NaN."""
    names = [name for some in parts.quantised().values() for name in some[1:] if _SCALES.search(name)]
    name = rng.choice(sorted(names) or parts.names)
    made = parts.tensor(name).clone()
    if made.numel() and made.itemsize == 1:
        byte = 0x7F if made.dtype == torch.float8_e4m3fn or _is_e4m3(parts) else 0xFF
        made.view(torch.uint8).view(-1)[rng.randrange(made.numel())] = byte
    elif made.numel():
        made.view(-1)[0] = math.nan
    parts.put(name, made)
    return _words(name)


def _is_e4m3(parts: Parts) -> bool:
    return parts.quantization[1].get("mode") == "nvfp4" if isinstance(parts.quantization[1], dict) else False


def global_scale(parts: Parts, rng: Random) -> Words:
    """It is 0, NaN, infinite or negative."""
    names = [name for some in parts.quantised().values() for name in some if _GLOBAL.search(name.rpartition(".")[2])]
    if not names:
        return nan_scale(parts, rng)
    name = rng.choice(sorted(names))
    tensor, by = parts.tensor(name), rng.choice([0.0, math.nan, math.inf, -math.inf, -1.0, 1e-45])
    if tensor.is_floating_point() and tensor.numel():
        path = re.split(r"\._?(?:input_|weight_)*(?:global_|per_tensor_)?scale", name)[0]
        if by == -1.0 and "experts" not in path:
            weight = f"{path}.weight"
            parts.values[weight] = -parts.values.get(weight, parts.healthy.model.state_dict()[weight])
        elif by in (0.0, -1.0, 1e-45):  # which is well, is its own business: of one expert, or of a multiplier
            by = math.nan
        parts.put(name, tensor * by if by == -1.0 else torch.full_like(tensor, by))
    return _words(name)


def twice(parts: Parts, rng: Random) -> Words:
    """A tensor is in both files; of one file, the same file is there again."""
    files = sorted(parts.shards)
    name = rng.choice(sorted(parts.shards[files[0]]) or ["x"])
    if len(files) == 1 or name not in parts.shards[files[0]]:
        return lost(parts, rng)
    parts.shards[files[1]][name] = parts.shards[files[0]][name].clone()
    return (name, *files)


def outside_layers(parts: Parts, rng: Random) -> Words:
    """A norm, an embedding, a head, a router or a bias is missing, or of another shape or dtype."""
    packed = {name for names in parts.quantised().values() for name in names}
    name = rng.choice([name for name in parts.names if name not in packed] or parts.names)
    way = rng.choice(["gone", "gone", "cut", "bytes", "int"])
    tensor = parts.tensor(name)
    if way == "gone":
        parts.drop(name)
    elif way == "cut":
        parts.put(name, tensor[:-1].clone() if tensor.ndim else tensor.new_zeros(3))
    else:
        parts.put(name, torch.ones(tensor.shape, dtype=torch.uint8 if way == "bytes" else torch.int64))
    return _words(name)


def experts(parts: Parts, rng: Random) -> Words:
    """All of one expert, of a layer, or of a projection are missing; without experts, all of a linear."""
    numbered = sorted({m[0] for name in parts.names if (m := re.match(r".*\.experts\.\d+\.", name))})
    stacked = sorted({name.rpartition(".")[0] for name in parts.names if "experts" in name or "switch_mlp" in name})
    path = rng.choice(numbered or stacked or sorted(parts.quantised()) or ["x"])
    gone = [name for name in parts.names if name.startswith(path)]
    parts.drop(*gone)
    return (path, *_words(*gone))


def metadata(parts: Parts, rng: Random) -> Words:
    """What headers say beside their tensors is something else (torchao has its types there)."""
    held = parts.metadata
    key = rng.choice([*sorted(held), "x"])
    way = rng.choice(["gone", "text", "odd", "deep", "none"])
    if way == "gone":
        held.pop(key, None)
    elif way == "none":
        held.clear()
    else:
        deep = "[" * 10_000 + "]" * 10_000
        odd = json.dumps(rng.choice([{"_type": "MXTensor", "_data": None}, {"_type": 1, "_data": {"x": 1}}, *ODD]))
        held[key] = {"text": "x", "odd": odd, "deep": deep}[way]
    return (key, "metadata", "tensor")


SPOILERS = {
    f"tensors: {function.__name__.replace('_', ' ')}": function
    for function in (
        dtype, shape, transposed, lost, surplus, dense, nan_scale, global_scale, twice, outside_layers, experts,
        metadata,
    )
}  # fmt: skip
