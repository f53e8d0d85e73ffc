"""Checkpoints of AMD Quark (``quant_method: quark``); read in version 0.13."""

from collections.abc import Iterator, Mapping
from fnmatch import translate
from typing import Any

from marlin_w4a16.checkpoints import said
from marlin_w4a16.checkpoints.fp8 import FP8Storage
from marlin_w4a16.checkpoints.layouts import Layout
from marlin_w4a16.checkpoints.scheme import CACHE_NOTE, LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FLOATS, STORED_SCALES, Activations, FP4Storage, Part

UNUSED = (
    Part("input_scale", "unused", ("F32", "BF16", "F16", "F8_E4M3", "U8"), optional=True),
    Part("input_scale_2", "unused", FLOATS, optional=True),
    Part("output_scale", "unused", FLOATS, optional=True),  # of a quantised cache
)
MXFP4 = (
    Part("weight", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e8m0"], ("n", "k/g")),
    *UNUSED,
)
NVFP4 = (
    Part("weight", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e4m3"], ("n", "k/g")),
    Part("weight_scale_2", "multiplier", FLOATS),
    *UNUSED,
)
FP8 = (Part("weight", "codes", ("F8_E4M3",), ("n", "k")), Part("weight_scale", "scales", FLOATS, ("n",)), *UNUSED)
EXPECTED = (
    "fp4 with scale_format e8m0 and group_size 32 or block_size [rows, 32], fp4 of group_size 16 with fp8_e4m3 scales "
    "and one scale for the tensor, or fp8_e4m3 per_tensor or per_channel"
)
Config = Mapping[str, Any]


def is_fp4(config: Config) -> bool:
    """Whether a quantisation config of Quark stores any layer as FP4."""
    stored = said.mapping(config, "export").get("weight_format", "real_quantized") == "real_quantized"
    return stored and any(spec.get("dtype") == "fp4" for _, layer in _layers(config) for spec in _specs(layer)[:1])


def scheme(config: Config) -> Scheme:
    """What a quantisation config says; layers in FP8 are decoded."""
    targets = {pattern: _storage(layer) for pattern, layer in _layers(config)}
    names = dict.fromkeys(s.label.removeprefix("Quark ") for s in targets.values() if isinstance(s, FP4Storage))
    exclude = said.names(config, "exclude")
    notes = (CACHE_NOTE,) if config.get("kv_cache_quant_config") else ()
    if not any(pattern.startswith("re:") for pattern in exclude):
        return Scheme("Quark", " + ".join(names) or "FP4", targets, exclude, "glob", notes)
    # as vLLM reads them; Quark itself has globs only
    targets = {key if key == LINEAR else f"re:{translate(key)}": stored for key, stored in targets.items()}
    exclude = tuple(key if key.startswith("re:") else f"re:{translate(key)}" for key in exclude)
    return Scheme("Quark", " + ".join(names) or "FP4", targets, exclude, "re", notes)


def _layers(config: Config) -> Iterator[tuple[str, Config]]:
    """What is said of layers, what goes first before the rest: of patterns of names, of classes, of all."""
    yield from said.objects(config, "layer_quant_config").items()
    classes = said.objects(config, "layer_type_quant_config")
    linear = next((layer for name, layer in classes.items() if name.rpartition(".")[2].startswith("Linear")), None)
    yield LINEAR, linear if linear is not None else said.mapping(config, "global_quant_config")


def _specs(layer: Config) -> list[Config]:
    """How the weight of a layer is quantised; where scales are quantised, too, how these are comes next."""
    weight = layer.get("weight")
    if isinstance(weight, list) and all(isinstance(one, Mapping) for one in weight):
        return weight
    return [said.mapping(layer, "weight")] if weight else []


def _storage(layer: Config) -> FP4Storage | FP8Storage | Mismatch | None:
    specs = _specs(layer)
    if not specs:
        return None
    one, two = specs[0], specs[1] if len(specs) == 2 else None
    kind = (one.get("dtype"), one.get("scale_format"), one.get("group_size"), len(specs))
    activations, label = _activations(layer), "Quark MXFP4"
    if kind[0] == "fp4" and kind[1] == "e8m0" and len(specs) == 1 and one.get("ch_axis", -1) in (-1, 1):
        rows = _rows(one)
        if rows is not None:
            return FP4Storage(label, "e8m0", (32,), MXFP4, activations, layout=Layout(rows=rows))
    scaled = two is not None and (two.get("dtype"), two.get("qscheme")) == ("fp8_e4m3", "per_tensor")
    if (kind[0], kind[2]) == ("fp4", 16) and scaled:
        return FP4Storage("Quark NVFP4", "e4m3", (16,), NVFP4, activations)
    if kind[0] == "fp8_e4m3" and len(specs) == 1 and one.get("qscheme") in ("per_tensor", "per_channel"):
        return FP8Storage("Quark FP8", FP8)
    return Mismatch(f"Quark's {' of '.join(map(_told, specs))}", EXPECTED)


def _rows(spec: Config) -> int | None:
    """How many rows share their scales, or None: no such blocks can be read."""
    block = spec.get("block_size")
    if block is None:
        return 1 if spec.get("group_size") == 32 else None
    if not isinstance(block, list | tuple) or len(block) != 2 or block[1] != 32:
        return None
    return block[0] if isinstance(block[0], int) and block[0] > 0 else None


def _told(spec: Config) -> str:
    named = ("qscheme", "group_size", "block_size", "scale_format", "mx_element_dtype", "ch_axis")
    rest = (f"{name} {spec[name]}" for name in named if spec.get(name) is not None)
    return ", ".join([str(spec.get("dtype")), *rest])


def _activations(layer: Config) -> Activations | None:
    inputs = layer.get("input_tensors")
    if not inputs:
        return None
    one = inputs[0] if isinstance(inputs, list) and isinstance(inputs[0], Mapping) else inputs
    one = one if isinstance(one, Mapping) else said.mapping(layer, "input_tensors")
    told = f"Quark quantises the inputs to {one.get('dtype')}"
    wanted = {"dtype": "fp4", "scale_format": "e8m0", "group_size": 32, "is_dynamic": True}
    mode = one.get("scale_calculation_mode", "even")
    if inputs is one and all(one.get(name) == value for name, value in wanted.items()) and mode == "even":
        return Activations(f"{told} (W4A4)", "e8m0", 32, "near")
    return Activations(told)
