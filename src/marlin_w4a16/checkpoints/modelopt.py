"""Checkpoints of NVIDIA ModelOpt (``export_hf_checkpoint``); read in version 0.47."""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.scheme import CACHE_NOTE, LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FLOATS, STORED_SCALES, Activations, FP4Storage, FP8Storage, Part
from marlin_w4a16.kernels.fp4 import GROUP_SIZES
from marlin_w4a16.kernels.scale_bytes import ScaleKind

PRE_QUANT_SCALE = Part("pre_quant_scale", "pre-quant scale", FLOATS, ("k",), optional=True)
INPUT_SCALE = Part("input_scale", "input multiplier", ("F32",), optional=True)
NVFP4 = (
    Part("weight", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e4m3"], ("n", "k/g")),
    Part("weight_scale_2", "multiplier", ("F32",)),
    INPUT_SCALE,  # W4A4: amax of the input / (6 * 448)
    PRE_QUANT_SCALE,  # where ModelOpt could not fold it into the layer before
)
MXFP4 = (
    Part("weight", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e8m0"], ("n", "k/g")),
    INPUT_SCALE,
    PRE_QUANT_SCALE,
)
FP8 = (
    Part("weight", "codes", ("F8_E4M3",), ("n", "k")),
    Part("weight_scale", "scales", FLOATS, ("n",)),
    INPUT_SCALE,
)
# quant_algo -> tensors, kind of scales, what becomes of the input
FP4_ALGORITHMS: dict[str, tuple[tuple[Part, ...], ScaleKind, str | None]] = {
    "NVFP4": (NVFP4, "e4m3", "FP4"),
    "W4A16_NVFP4": (NVFP4, "e4m3", None),
    "NVFP4_AWQ": (NVFP4, "e4m3", "FP4"),
    "W4A8_NVFP4_FP8": (NVFP4, "e4m3", "FP8"),
    "MXFP4": (MXFP4, "e8m0", "FP4"),
    "W4A8_MXFP4_FP8": (MXFP4, "e8m0", "FP8"),
}
SIZES: dict[ScaleKind, tuple[int, ...]] = {"e4m3": GROUP_SIZES, "e8m0": (32,)}
FP8_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN")
SINGLE = (*FP4_ALGORITHMS, *FP8_ALGORITHMS, "MIXED_PRECISION")


def scheme(config: Mapping[str, Any]) -> Scheme:
    """What a quantisation config says: that of config.json (``quant_method: modelopt``) or hf_quant_config.json.

    Raises:
        CheckpointError: it names no algorithm.
    """
    values = _values(config)
    algorithm = str(values.get("quant_algo") or "").upper()
    if not algorithm:
        raise CheckpointError(
            f"quantization_config: quant_algo: found none, expected one of {', '.join(SINGLE)}; a checkpoint that has "
            "only a hf_quant_config.json needs quantization_config=marlin_w4a16.hf.ModelOptConfig.of(path)"
        )
    if algorithm == "MIXED_PRECISION":
        layers = values.get("quantized_layers") or {}
        targets = {_path(name): _storage(layer) for name, layer in layers.items()}
    else:
        targets = {LINEAR: _storage(values)}
    ignore = tuple(map(_path, values.get("exclude_modules") or values.get("ignore") or ()))
    cache = values.get("kv_cache_quant_algo") or values.get("kv_cache_scheme")
    return Scheme("ModelOpt", algorithm, targets, ignore, "glob", (CACHE_NOTE,) if cache else ())


def _path(name: str) -> str:
    """The path in a name of a config: ModelOpt 0.47 leaves a mark of its own behind those that it had to rename."""
    return name.partition("\0")[0].removesuffix(".") if "\0" in name else name


def _values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """hf_quant_config.json nests them."""
    values: Mapping[str, Any] = config.get("quantization") or config
    return values


def _storage(layer: Mapping[str, Any]) -> FP4Storage | FP8Storage | Mismatch:
    algorithm = str(layer.get("quant_algo")).upper()
    if algorithm in FP8_ALGORITHMS:
        return FP8Storage(f"ModelOpt {algorithm}", FP8)
    if algorithm not in FP4_ALGORITHMS:
        known = ", ".join([*FP4_ALGORITHMS, *FP8_ALGORITHMS])
        return Mismatch(f"ModelOpt's {algorithm}", f"one of {known}")
    parts, kind, inputs = FP4_ALGORITHMS[algorithm]
    group = layer.get("group_size") or _group_of(layer)
    groups = (group,) if group else SIZES[kind]  # config.json of NVFP4_AWQ and all of MXFP4 do not say it
    if groups[0] not in GROUP_SIZES:
        return Mismatch(f"ModelOpt's {algorithm} with group_size {group!r}", f"one of {GROUP_SIZES}")
    activations = None
    if inputs == "FP4":
        activations = Activations("ModelOpt quantises the inputs to FP4 (W4A4)", kind, group or 0, "up")
    elif inputs == "FP8":
        activations = Activations("ModelOpt quantises the inputs to FP8 (W4A8)")
    return FP4Storage(f"ModelOpt {algorithm}", kind, groups, parts, activations)


def _group_of(layer: Mapping[str, Any]) -> int | None:
    groups = layer.get("config_groups") or {}
    return next((g["weights"].get("group_size") for g in groups.values() if isinstance(g.get("weights"), dict)), None)
