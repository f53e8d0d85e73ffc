"""Checkpoints of compressed-tensors (llm-compressor); read in version 0.20."""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.scheme import CACHE_NOTE, LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FLOATS, STORED_SCALES, Activations, FP4Storage, Part
from marlin_w4a16.kernels.scale_bytes import ScaleKind

NVFP4 = (
    Part("weight_packed", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e4m3"], ("n", "k/g")),
    Part("weight_global_scale", "divisor", FLOATS),
    Part("input_global_scale", "input divisor", FLOATS, optional=True),  # W4A4: 6 * 448 / amax of the input
)
MXFP4 = (
    Part("weight_packed", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e8m0"], ("n", "k/g")),
)
FORMATS: dict[str, tuple[tuple[Part, ...], ScaleKind, int]] = {
    "nvfp4-pack-quantized": (NVFP4, "e4m3", 16),
    "mxfp4-pack-quantized": (MXFP4, "e8m0", 32),
}
_INPUTS = {"num_bits": 4, "type": "float"}
_PRESETS: dict[str, dict[str, Any]] = {
    "NVFP4A16": {"format": "nvfp4-pack-quantized"},
    "NVFP4": {"format": "nvfp4-pack-quantized", "input_activations": {**_INPUTS, "group_size": 16}},
    "MXFP4A16": {"format": "mxfp4-pack-quantized"},
    "MXFP4": {"format": "mxfp4-pack-quantized", "input_activations": {**_INPUTS, "group_size": 32}},
}
# Where compressed-tensors has multiplied a rotation into the stored weight already; others are run with each input.
_FUSED = ("weight_input", "weight_output")
# Of the groups of a config that was saved as the user gave it: it names no format but "mixed-precision".
BY_GROUP_SIZE = {size: name for name, (_, _, size) in FORMATS.items()}


def is_fp4(config: Fields) -> bool:
    """Whether a quantisation config of compressed-tensors stores any layer as FP4."""
    formats = [config.text("format"), *(group.text("format") for group in _groups(config).values())]
    alone = config.text("format") in FORMATS and not config.has("config_groups")
    return alone or bool(fp4_groups(config)) or any(map(_is_odd, formats))


def scheme(config: Fields) -> Scheme:
    """What a quantisation config says; groups that are not FP4 are left to compressed-tensors.

    Raises:
        CheckpointError: weights are rotated, or an entry is of another type than it must have.
    """
    _expect_no_rotation(config)
    _expect_known(config)
    groups, stored = _groups(config), dict[str, FP4Storage | Mismatch | None]()
    for group in groups.values():
        if not group.has("targets"):
            raise group.wrong("targets", group.values.get("targets"), "a list of modules, such as ['Linear']")
        stored |= dict.fromkeys(group.texts("targets"), _storage(config, group))
    if not groups:  # a format alone says it of all linears
        stored[LINEAR] = _storage(config, Fields({}, config.where))
    # as compressed_tensors.utils.match_targets has it: names, then patterns, then classes, each in alphabetical order
    targets = {target: stored[target] for target in sorted(stored, key=lambda t: (t == LINEAR, t))}
    names = dict.fromkeys(str(_format(config, group)) for group in groups.values()) or {
        config.text("format") or "": None
    }
    notes = (CACHE_NOTE,) if config.has("kv_cache_scheme") else ()
    return Scheme(
        "compressed-tensors", " + ".join(names), targets, config.texts("ignore"), "re", notes, where=config.where
    )


def fp4_groups(config: Fields) -> set[str]:
    """The names of the config groups that are FP4."""
    return {name for name, group in _groups(config).items() if _format(config, group) in FORMATS}


def _groups(config: Fields) -> dict[str, Fields]:
    """Groups by name; in a config that was saved as the user gave it, a preset with its targets may be one."""
    inner, groups = config.fields("config_groups"), dict[str, Fields]()
    for name, group in inner.values.items():
        preset = {"targets": group, **_PRESETS.get(name.upper(), {"format": "another"})}
        groups[name] = Fields(preset if isinstance(group, list | tuple) else group, f"{inner.where}.{name}")
    return groups


def _expect_known(config: Fields) -> None:
    for holder in (config, *_groups(config).values()):
        name = holder.text("format")
        if name is not None and _is_odd(name):
            raise holder.wrong("format", name, f"one of {', '.join(FORMATS)}")


def _is_odd(name: str | None) -> bool:
    """Whether a format is of FP4 and not known: ``nvfp4-e5m3-pack-quantized`` of AutoRound has unsigned scales."""
    return name is not None and "fp4" in name and name not in FORMATS


def _expect_no_rotation(config: Fields) -> None:
    """Weights may be stored rotated (QuIP, SpinQuant); what is rotated back while the model runs is not run here."""
    for name, group in config.fields("transform_config").each("config_groups").items():
        applied = group.values.get("apply") or ()
        if not isinstance(applied, list | tuple):
            raise group.wrong("apply", applied, "a list of objects")
        for at, apply in enumerate(applied):
            location = apply.get("location") if isinstance(apply, Mapping) else apply
            if str(getattr(location, "value", location)) not in _FUSED:
                raise group.wrong(
                    f"apply[{at}].location",
                    str(location),
                    f"none but {' and '.join(_FUSED)}: the rotation {name!r} of inputs (Hadamard) would be left out, "
                    "and the model be wrong",
                )


def _format(config: Fields, group: Fields) -> str | None:
    name, weights = group.text("format") or config.text("format"), group.fields("weights")
    if name == "mixed-precision" and (weights.number("num_bits"), weights.text("type")) == (4, "float"):
        return BY_GROUP_SIZE.get(weights.number("group_size") or 0)
    return name


def _storage(config: Fields, group: Fields) -> FP4Storage | Mismatch | None:
    name = _format(config, group)
    if name not in FORMATS:
        return None
    parts, kind, size = FORMATS[name]
    found = group.fields("weights").number("group_size") or size
    if found != size:
        return Mismatch(f"{name} with group_size {found}", f"group_size {size}")
    if group.has("output_activations"):
        return Mismatch(f"{name} with quantised outputs", "none")
    return FP4Storage(f"compressed-tensors {name}", kind, (size,), parts, _activations(group))


def _activations(group: Fields) -> Activations | None:
    if not group.has("input_activations"):
        return None
    args = group.fields("input_activations")
    bits, of, size = args.number("num_bits"), args.text("type"), args.number("group_size") or 0
    told = f"compressed-tensors quantises the inputs to {bits} bit {of}"
    kind: ScaleKind | None = {16: "e4m3", 32: "e8m0"}.get(size)  # type: ignore[assignment]
    if bits != 4 or of != "float" or kind is None:
        return Activations(told)
    return Activations(f"{told} (W4A4)", kind, size)
