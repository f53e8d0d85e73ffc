"""Checkpoints of NVIDIA ModelOpt (``export_hf_checkpoint``); read in version 0.47."""

from collections.abc import Iterator

from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.fp8 import FP8Storage, Storage
from marlin_w4a16.checkpoints.scheme import CACHE_NOTE, LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FLOATS, STORED_SCALES, Activations, FP4Storage, Part
from marlin_w4a16.kernels.fp4 import GROUP_SIZES
from marlin_w4a16.kernels.scale_bytes import ScaleKind

PRE_QUANT_SCALE = Part("pre_quant_scale", "pre-quant scale", FLOATS, ("k",), optional=True)
INPUT_SCALE = Part("input_scale", "input multiplier", FLOATS, optional=True)
NVFP4 = (
    Part("weight", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e4m3"], ("n", "k/g")),
    Part("weight_scale_2", "multiplier", FLOATS),
    INPUT_SCALE,  # W4A4: amax of the input / (6 * 448)
    PRE_QUANT_SCALE,  # where ModelOpt could not fold it into the layer before
)
# The low-rank part reads the input after its pre-quant scale (SVDQuantLinear). ModelOpt 0.47 leaves its tensors in a
# module of their own, but where it exports diffusers.
NESTED = ("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b")
SVD = (
    *NVFP4,
    Part("svdquant_lora_a", "low rank a", FLOATS, ("r", "k"), optional=True, aliases=NESTED[:1]),
    Part("svdquant_lora_b", "low rank b", FLOATS, ("n", "r"), optional=True, aliases=NESTED[1:]),
)
MXFP4 = (
    Part("weight", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e8m0"], ("n", "k/g")),
    INPUT_SCALE,
    PRE_QUANT_SCALE,
)
FP8 = (
    Part("weight", "codes", ("F8_E4M3",), ("n", "k")),
    Part("weight_scale", "scales", FLOATS, ("n",), aliases=("weight_scale_inv",)),
    INPUT_SCALE,
)
MXFP8 = (FP8[0], Part("weight_scale", "scales", STORED_SCALES["e8m0"]), INPUT_SCALE)
# quant_algo -> tensors, kind of scales, what becomes of the input
FP4_ALGORITHMS: dict[str, tuple[tuple[Part, ...], ScaleKind, str | None]] = {
    "NVFP4": (NVFP4, "e4m3", "FP4"),
    "W4A16_NVFP4": (NVFP4, "e4m3", None),
    "NVFP4_AWQ": (NVFP4, "e4m3", "FP4"),
    "NVFP4_SVD": (SVD, "e4m3", "FP4"),
    "W4A8_NVFP4_FP8": (NVFP4, "e4m3", "FP8"),
    "MXFP4": (MXFP4, "e8m0", "FP4"),
    "W4A8_MXFP4_FP8": (MXFP4, "e8m0", "FP8"),
}
SIZES: dict[ScaleKind, tuple[int, ...]] = {"e4m3": GROUP_SIZES, "e8m0": (32,)}
# quant_algo -> tensors, rows and columns that share a scale; one for the weight or for each row where there are none
FP8_ALGORITHMS: dict[str, tuple[tuple[Part, ...], tuple[int, int] | None]] = {
    "FP8": (FP8, None),
    "FP8_PER_CHANNEL_PER_TOKEN": (FP8, None),
    "FP8_PB_WO": (FP8, (128, 128)),
    "FP8_BLOCK_SCALES": (FP8, (128, 128)),
    "MXFP8": (MXFP8, (1, 32)),
}
# Beside a tensor of all experts: gate_up_proj, gate_up_proj_weight_scale ...
STACKED = ("weight_scale_2", "weight_scale", "input_scale")
SINGLE = (*FP4_ALGORITHMS, *FP8_ALGORITHMS, "MIXED_PRECISION")


def scheme(config: Fields) -> Scheme:
    """What a quantisation config says: that of config.json (``quant_method: modelopt``) or hf_quant_config.json.

    Raises:
        CheckpointError: it names no algorithm, or an entry is of another type than it must have.
    """
    values = config.fields("quantization") if config.has("quantization") else config  # hf_quant_config.json nests them
    algorithm = (values.text("quant_algo") or "").upper()
    if not algorithm:
        raise values.wrong("quant_algo", None, f"one of {', '.join(SINGLE)}")
    targets: dict[str, Storage | Mismatch | None]
    if algorithm == "MIXED_PRECISION":
        layers = {_path(name): _storage(layer) for name, layer in values.each("quantized_layers").items()}
        targets = {**dict(_of_groups(values)), **layers}
    else:
        targets = {LINEAR: _storage(values)}
    ignore = tuple(map(_path, (*values.texts("exclude_modules"), *values.texts("ignore"))))
    cached = values.has("kv_cache_quant_algo") or values.has("kv_cache_scheme")
    notes = (CACHE_NOTE,) if cached else ()
    return Scheme(
        "ModelOpt", algorithm, targets, ignore, notes=notes, joined=STACKED, nested=NESTED, known=KNOWN,
        where=values.where,
    )  # fmt: skip


def storage(algorithm: str, group: int | None = None) -> Storage | Mismatch:
    """How ModelOpt stores a linear by an algorithm; a group size where it says one."""
    if algorithm in FP8_ALGORITHMS:
        parts, block = FP8_ALGORITHMS[algorithm]
        return FP8Storage(f"ModelOpt {algorithm}", parts, block)
    if algorithm not in FP4_ALGORITHMS:
        return Mismatch(f"ModelOpt's {algorithm}", f"one of {', '.join([*FP4_ALGORITHMS, *FP8_ALGORITHMS])}")
    parts, kind, inputs = FP4_ALGORITHMS[algorithm]
    groups = (group,) if group else SIZES[kind]  # config.json of NVFP4_AWQ and all of MXFP4 do not say it
    if not set(groups) <= set(SIZES[kind]):
        return Mismatch(f"ModelOpt's {algorithm} with group_size {group!r}", f"one of {SIZES[kind]}")
    activations = None
    if inputs == "FP4":
        activations = Activations("ModelOpt quantises the inputs to FP4 (W4A4)", kind, group or 0, "up")
    elif inputs == "FP8":
        activations = Activations("ModelOpt quantises the inputs to FP8 (W4A8)")
    return FP4Storage(f"ModelOpt {algorithm}", kind, groups, parts, activations)


def _path(name: str) -> str:
    """The path in a name of a config: ModelOpt 0.47 leaves a mark of its own behind those that it had to rename."""
    return name.partition("\0")[0].removesuffix(".") if "\0" in name else name


def _storage(layer: Fields) -> Storage | Mismatch:
    return storage((layer.text("quant_algo") or "").upper(), layer.number("group_size") or _group_of(layer))


def _of_groups(values: Fields) -> Iterator[tuple[str, Storage | Mismatch]]:
    """The layers that config_groups name, which stand beside quantized_layers, or in their place."""
    for group in values.each("config_groups").values():
        weights, inputs = group.fields("weights"), group.has("input_activations")
        algorithm = {4: "NVFP4" if inputs else "W4A16_NVFP4", 8: "FP8"}.get(weights.number("num_bits") or 0)
        for target in group.texts("targets") if algorithm is not None else ():
            if target != LINEAR:
                yield _path(target), storage(algorithm or "", weights.number("group_size"))


def _group_of(layer: Fields) -> int | None:
    sizes = (group.fields("weights").number("group_size") for group in layer.each("config_groups").values())
    return next((size for size in sizes if size), None)


def _known() -> tuple[Storage, ...]:
    found = (storage(name) for name in ("W4A16_NVFP4", "MXFP4", *FP8_ALGORITHMS))
    return tuple(one for one in found if not isinstance(one, Mismatch))


KNOWN = _known()
