"""Spoils quantisation configs. A spoiler returns the words of which a refusal must have one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from random import Random
from typing import Any

from spoiled.parts import CONFIG, OTHER, Parts, at, nodes, text

Words = tuple[str, ...]
LONG = 200_000
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 10**30, "", "x", "NVFP4", "Linear", "re:.*", [], {}, [[]], [None], [1, "a"],
    {"a": {}}, {"a": None}, {"": ""}, math.nan, math.inf, -math.inf, -0.0, 1e400, "\ud800", "\0", "é" * 50, "16",
]  # fmt: skip
EVIL = [
    r"re:(a|a)*$", r"re:(.|.)*\d$", r"re:(.*)*\d$", "re:" + "(" * 200 + ")" * 200, "re:" + "(" * 5000, "re:[",
    "re:(?:.{1000}){1000}", r"re:(\w+\s?)+$x", r"re:(?=(.*)*)x", r"re:(?P<a>.)(?P=a)*(?P=b)", "re:" + "a?" * 400 + "b",
    "re:(?R)", "re:*", "re:" + ".*" * 300 + "x", "re:\\", "re:(?<=a+)b", "re:(?i)" + "|".join(["x"] * 900),
    "*" * 500 + "x", "[", "[!]", "*[a-", "?" * 3000, "re:" + "x{0,9999}" * 3, "re:(?e)(?:abc){e<=9}", "re:.*\udcff",
    "(a+)+$", ".*" * 200, "re:", "*", "", "re:.*",
]  # fmt: skip
ALGORITHMS = [
    "NVFP4", "MXFP4", "FP8", "INT4_AWQ", "W4A8_AWQ", "NVFP4_SVD", "MIXED_PRECISION", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "pack-quantized", "fp4", "int4", "mx_fp", "nv_fp", "int", "mxfp4",
    "nvfp4", "affine", "e4m3", "e8m0", "float", "MXFP8", "nvfp4_v2",
]  # fmt: skip
METHODS = [
    "modelopt", "compressed-tensors", "mxfp4", "fp8", "quark", "auto-round", "fp_quant", "torchao", "mlx", "gptq",
    "awq", "bitsandbytes", "none", "MODELOPT", "modelopt_fp4", "",
]  # fmt: skip
_LISTS = ("ignore", "exclude_modules", "exclude", "targets", "modules_to_not_convert", "extra_config")


def _node(parts: Parts, rng: Random, kinds: type | tuple[type, ...] = object) -> tuple[Any, tuple[Any, ...]]:
    """A quantisation config, and the path of one of its entries; those of lists of names count as one."""
    root = parts.quantization[1]
    found = [p for p in nodes(root) if isinstance(at(root, p), kinds)]
    return root, rng.choice(found or list(nodes(root)))


def _set(root: Any, path: tuple[Any, ...], value: Any) -> Words:
    at(root, path[:-1])[path[-1]] = copy.deepcopy(value)
    return _words(path)


def _words(path: tuple[Any, ...]) -> Words:
    return (*(str(key) for key in path if isinstance(key, str)), "quantization")


def wrong_type(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng)
    return _set(root, path, rng.choice(ODD))


def whole(parts: Parts, rng: Random) -> Words:
    """The config itself is something else."""
    odd = rng.choice([one for one in ODD if one != {} and one is not None])
    if parts.other is not None:
        parts.other["quantization"] = odd
    for key in ("quantization", "quantization_config"):
        if key in parts.config:
            parts.config[key] = odd
    return ("quantization",)


def missing_key(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng)
    del at(root, path[:-1])[path[-1]]
    return _words(path)


def unknown_key(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng, dict)
    inner = at(root, path)
    if not isinstance(inner, dict) or rng.random() < 0.5:
        inner = root
    inner[rng.choice(["x", "", "\ud800", "quant_algo ", "weight", "é", "\0", "x" * 5000, "rotation"])] = rng.choice(ODD)
    return ()


def deep(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng)
    return (*_set(root, path, rng.choice(["@lists@", "@objects@"])), "deep nesting", "recursion")


def huge(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng)
    names = [f"model.layers.{i}.x" for i in range(LONG)]
    values = ["x" * LONG * 10, names, {name: {} for name in names[:50_000]}, [f"re:.*{name}" for name in names[:2000]],
              [f"*{i}*" for i in range(LONG)], 10**4000]  # fmt: skip
    return _set(root, path, rng.choice(values))


def not_finite(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng, (int, float))
    return _set(root, path, rng.choice([math.nan, math.inf, -math.inf]))


def bool_for_int(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng, (int, float))
    return _set(root, path, rng.choice([True, False]))


def sizes(parts: Parts, rng: Random) -> Words:
    """Numbers are negative, zero, huge or other ones."""
    root, path = _node(parts, rng, int)
    return _set(root, path, rng.choice([0, -1, -16, 1, 8, 15, 16, 32, 64, 128, 2**31, 2**63, 10**30]))


def algorithms(parts: Parts, rng: Random) -> Words:
    """Another word of some producer stands where one stood."""
    root, path = _node(parts, rng, str)
    return _set(root, path, rng.choice(ALGORITHMS))


def method(parts: Parts, rng: Random) -> Words:
    root = parts.quantization[1]
    root["quant_method"] = rng.choice(METHODS)
    return ("quant_method", "quantization_config")


def patterns(parts: Parts, rng: Random) -> Words:
    """A pattern that is none, or takes long."""
    root = parts.quantization[1]
    some = [p for p in nodes(root) if p[-1] in _LISTS] or [(rng.choice(_LISTS[:-1]),)]
    path, evil = rng.choice(some), rng.sample(EVIL, rng.choice([1, 1, 3]))
    if path[-1] == "extra_config":
        inner = dict(at(root, path) or {}) if len(path) == 1 and path[0] in root else {}
        root["extra_config"] = inner | {one.removeprefix("re:"): {"bits": 16} for one in evil}
        return ("extra_config", "weight_scale", *evil)
    held = at(root, path) if path[-1] in at(root, path[:-1]) else []
    at(root, path[:-1])[path[-1]] = [*evil, *(held if isinstance(held, list) and rng.random() < 0.7 else [])]
    return (str(path[-1]), "what is ignored", "what is quantised", ".weight", *evil)


def empty(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng, (dict, list))
    value = at(root, path)
    return _set(root, path, [] if isinstance(value, list) else {})


def unicode(parts: Parts, rng: Random) -> Words:
    root, path = _node(parts, rng, str)
    mark = rng.choice(["\u200b", "\ud800", "\0", "\u0130", "\U0001f600", "\u202e", "é"])
    value = at(root, path)
    made = [mark + value, value + mark, value.upper() + mark, mark] if isinstance(value, str) else [mark]
    return _set(root, path, rng.choice(made))


def elsewhere(parts: Parts, rng: Random) -> Words:
    """It stands in another place, in two, or nowhere."""
    held = copy.deepcopy(parts.quantization[1])
    way = rng.choice(["gone", "text_config", "twice", "null"])
    if way == "twice":
        parts.other = {"quantization": {**held, "quant_algo": rng.choice(ALGORITHMS)}}
        if parts.config.get("quantization_config") is None:
            parts.config["quantization_config"] = {**held, "quant_method": "modelopt"}
        return ("quant",)
    for key in ("quantization", "quantization_config"):
        parts.config.pop(key, None)
        if way == "null":
            parts.config[key] = None
    if way == "text_config":
        parts.config["text_config"] = {"quantization_config": held}
    elif parts.other is not None:
        parts.other = None
    return ("quantization",)


def of_text(parts: Parts, rng: Random) -> Words:
    """A file is no JSON, or no UTF-8, or an object twice."""
    file = OTHER if parts.other is not None and rng.random() < 0.7 else CONFIG
    way, cut = (
        rng.choice(["cut", "empty", "utf-16", "bom", "bytes", "list", "twice", "deep", "nul", "folder"]),
        rng.random(),
    )

    def change(folder: Path) -> None:
        path = folder / file
        was = path.read_bytes()
        if way == "folder":
            path.unlink()
            path.mkdir()
            return
        made = {
            "cut": was[: int(len(was) * cut)], "empty": b"", "bom": b"\xef\xbb\xbf" + was, "list": b"[" + was + b"]",
            "utf-16": was.decode().encode("utf-16"), "bytes": was[:20] + b"\xff\xfe" + was[20:], "nul": was + b"\0" * 9,
            "twice": b"{" + was.strip()[1:-1] + b"," + was.strip()[1:], "deep": text("@lists@").encode(),
        }  # fmt: skip
        path.write_bytes(made[way])

    parts.after.append(change)
    return (file,)


SPOILERS = {
    f"config: {function.__name__.replace('_', ' ')}": function
    for function in (
        wrong_type, wrong_type, whole, missing_key, unknown_key, deep, huge, not_finite, bool_for_int, sizes,
        algorithms, method, patterns, empty, unicode, elsewhere, of_text,
    )
}  # fmt: skip
