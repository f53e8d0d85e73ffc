"""Checkpoints of Intel AutoRound in its own format (``quant_method: auto-round``); read in version 0.16.

The tensors are those of compressed-tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints import compressed_tensors, said
from marlin_w4a16.checkpoints.scheme import LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import Activations, FP4Storage
from marlin_w4a16.kernels.scale_bytes import ScaleKind

Config = Mapping[str, Any]
# data_type -> tensors, kind of scales, columns that share one
FORMATS = {"nv_fp": compressed_tensors.FORMATS["nvfp4-pack-quantized"],
           "mx_fp": compressed_tensors.FORMATS["mxfp4-pack-quantized"]}  # fmt: skip
E5M3 = Mismatch(
    "NVFP4_E5M3: unsigned E5M3 scales without a global scale, which neither this project nor compressed-tensors has",
    "NVFP4 (E4M3 scales and a global scale) or MXFP4: export the model with scheme NVFP4",
)
# The name under which AutoRound writes NVFP4_E5M3 as if it were of compressed-tensors.
E5M3_FORMAT = "nvfp4-e5m3-pack-quantized"


def is_fp4(config: Config) -> bool:
    """Whether a quantisation config of AutoRound stores any layer as FP4, and not weights of that value."""
    fake = str(config.get("packing_format")).endswith("fake")
    return not fake and any(_is_fp4({**config, **layer}) for layer in ({}, *_extra(config).values()))


def scheme(config: Config) -> Scheme:
    """What a quantisation config says: patterns of layers are regular expressions that may begin anywhere."""
    targets = {key: _storage({**config, **layer}) for name, layer in _extra(config).items() for key in _keys(name)}
    targets[LINEAR] = _storage(config)
    dense = tuple(f"re:.*{name}" for name in said.names(config, "modules_to_not_convert"))
    name = str(config.get("packing_format") or config.get("data_type"))
    return Scheme("AutoRound", name.removeprefix("auto_round:"), targets, dense, "re")


def e5m3(config: Config) -> Scheme | None:
    """What AutoRound writes in the name of compressed-tensors, which refuses it too; None: something else."""
    groups = config.get("config_groups")
    listed = groups.values() if isinstance(groups, Mapping) else ()
    formats = [config.get("format"), *(group.get("format") for group in listed if isinstance(group, Mapping))]
    if E5M3_FORMAT not in formats:
        return None
    return Scheme("compressed-tensors", E5M3_FORMAT, {LINEAR: E5M3}, said.names(config, "ignore"), "re")


def _extra(config: Config) -> dict[str, Config]:
    return said.objects(config, "extra_config")


def _keys(name: str) -> tuple[str, ...]:
    """A name is that of a layer, or a pattern where it is one."""
    try:
        re.compile(name)
    except (re.error, RecursionError, OverflowError):
        return (name,)
    return name, f"re:.*(?:{name})"


def _data_type(layer: Config) -> str:
    return str(layer.get("data_type") or "int")


def _is_fp4(layer: Config) -> bool:
    return said.number(layer, "bits", 4) == 4 and _data_type(layer).startswith(("nv_fp", "nvfp", "mx_fp"))


def _storage(layer: Config) -> FP4Storage | Mismatch | None:
    bits, data_type, group = said.number(layer, "bits", 4), _data_type(layer), layer.get("group_size")
    if bits >= 16:
        return None
    if data_type == "nvfp4_v2":
        return E5M3
    if layer.get("rotation_config"):
        return Mismatch("AutoRound's rotation_config: the inputs of layers are rotated", "no rotation")
    made = FORMATS.get(data_type[:5])
    if bits != 4 or made is None or group != made[2]:
        found = f"AutoRound's {data_type} of {bits} bits with group_size {group}"
        return Mismatch(found, "nv_fp of 4 bits with group_size 16, or mx_fp of 4 bits with group_size 32")
    parts, kind, size = made
    return FP4Storage(f"AutoRound {_NAMES[kind]}", kind, (size,), parts, _activations(layer))


_NAMES: dict[ScaleKind, str] = {"e4m3": "NVFP4", "e8m0": "MXFP4"}


def _activations(layer: Config) -> Activations | None:
    bits = said.number(layer, "act_bits", 16)
    told = f"AutoRound quantises the inputs to {layer.get('act_data_type') or layer.get('data_type')} of {bits} bits"
    return Activations(told) if bits <= 8 else None
