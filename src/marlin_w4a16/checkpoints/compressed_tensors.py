"""Checkpoints of compressed-tensors (llm-compressor); read in version 0.20."""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints.scheme import CACHE_NOTE, LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import STORED_SCALES, Activations, FP4Storage, Part
from marlin_w4a16.kernels.scale_bytes import ScaleKind

NVFP4 = (
    Part("weight_packed", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e4m3"], ("n", "k/g")),
    Part("weight_global_scale", "divisor", ("F32",)),
    Part("input_global_scale", "input divisor", ("F32",), optional=True),  # W4A4: 6 * 448 / amax of the input
)
MXFP4 = (
    Part("weight_packed", "codes", ("U8",), ("n", "k/2")),
    Part("weight_scale", "scales", STORED_SCALES["e8m0"], ("n", "k/g")),
)
FORMATS: dict[str, tuple[tuple[Part, ...], ScaleKind, int]] = {
    "nvfp4-pack-quantized": (NVFP4, "e4m3", 16),
    "mxfp4-pack-quantized": (MXFP4, "e8m0", 32),
}
# Of the groups of a config that was saved as the user gave it: it names no format but "mixed-precision".
BY_GROUP_SIZE = {size: name for name, (_, _, size) in FORMATS.items()}


def is_fp4(config: Mapping[str, Any]) -> bool:
    """Whether a quantisation config of compressed-tensors stores any layer as FP4."""
    return bool(fp4_groups(config))


def scheme(config: Mapping[str, Any]) -> Scheme:
    """What a quantisation config says; groups that are not FP4 are left to compressed-tensors."""
    stored = {target: _storage(config, group) for group in _groups(config).values() for target in group["targets"]}
    # as compressed_tensors.utils.match_targets has it: names, then patterns, then classes, each in alphabetical order
    targets = {target: stored[target] for target in sorted(stored, key=lambda t: (t == LINEAR, t))}
    names = dict.fromkeys(str(_format(config, group)) for group in _groups(config).values())
    notes = (CACHE_NOTE,) if config.get("kv_cache_scheme") else ()
    return Scheme("compressed-tensors", " + ".join(names), targets, tuple(config.get("ignore") or ()), "re", notes)


def fp4_groups(config: Mapping[str, Any]) -> set[str]:
    """The names of the config groups that are FP4."""
    return {name for name, group in _groups(config).items() if _format(config, group) in FORMATS}


def _groups(config: Mapping[str, Any]) -> Mapping[str, Any]:
    groups: Mapping[str, Any] = config.get("config_groups") or {}
    return {name: group for name, group in groups.items() if isinstance(group, Mapping)}


def _format(config: Mapping[str, Any], group: Mapping[str, Any]) -> str | None:
    name, weights = group.get("format") or config.get("format"), group.get("weights") or {}
    if name == "mixed-precision" and (weights.get("num_bits"), weights.get("type")) == (4, "float"):
        return BY_GROUP_SIZE.get(weights.get("group_size") or 0)
    return name


def _storage(config: Mapping[str, Any], group: Mapping[str, Any]) -> FP4Storage | Mismatch | None:
    name = _format(config, group)
    if name not in FORMATS:
        return None
    parts, kind, size = FORMATS[name]
    weights = group.get("weights") or {}
    if weights.get("group_size", size) != size:
        return Mismatch(f"{name} with group_size {weights['group_size']}", f"group_size {size}")
    if group.get("output_activations"):
        return Mismatch(f"{name} with quantised outputs", "none")
    return FP4Storage(f"compressed-tensors {name}", kind, (size,), parts, _activations(group.get("input_activations")))


def _activations(args: Mapping[str, Any] | None) -> Activations | None:
    if not args:
        return None
    told = f"compressed-tensors quantises the inputs to {args.get('num_bits')} bit {args.get('type')}"
    kind: ScaleKind | None = {16: "e4m3", 32: "e8m0"}.get(args.get("group_size") or 0)  # type: ignore[assignment]
    if args.get("num_bits") != 4 or args.get("type") != "float" or kind is None:
        return Activations(told)
    return Activations(f"{told} (W4A4)", kind, args["group_size"])
