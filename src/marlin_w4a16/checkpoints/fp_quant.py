"""Checkpoints of FP-Quant (``quant_method: fp_quant``, QuTLASS); read in fp_quant 0.3 and transformers 5.23.

Weights are rotated, block of columns by block, before they are quantised; so must inputs be.
"""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints import said
from marlin_w4a16.checkpoints.scheme import LINEAR, Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FLOATS, Activations, FP4Storage, Part
from marlin_w4a16.kernels.scale_bytes import ScaleKind


def _parts(scales: str) -> tuple[Part, ...]:
    return (
        Part("qweight", "codes", ("U8",), ("n", "k/2")),
        Part("scales", "scales", ("U8", scales), ("n", "k/g")),
        Part("weight_global_scale", "divisor", FLOATS),  # 10 in NVFP4, 3 in MXFP4 by abs_max, else 1
        Part("forward_hadamard_matrix", "rotation", FLOATS),
        Part("act_global_scale", "unused", FLOATS, optional=True),
        Part("backward_hadamard_matrix", "unused", FLOATS, optional=True),
        # empty: what transformers puts there when it loads, and so saves
        Part("weight", "unused", FLOATS, optional=True),
        Part("dqweight", "unused", FLOATS, optional=True),
    )


FORMATS: dict[str, tuple[tuple[Part, ...], ScaleKind, int]] = {
    "nvfp4": (_parts("F8_E4M3"), "e4m3", 16),
    "mxfp4": (_parts("F8_E8M0"), "e8m0", 32),
}


def is_fp4(config: Mapping[str, Any]) -> bool:
    """Whether a config stores codes: not weights to be trained, nor those that are FP4 in value only."""
    return not config.get("pseudoquantization") and not config.get("store_master_weights")


def scheme(config: Mapping[str, Any]) -> Scheme:
    """What a quantisation config says; names of dense layers are ends of paths."""
    name = str(config.get("forward_dtype", "nvfp4"))
    given = config.get("modules_to_not_convert") is not None
    ignore = tuple(f"*{end}" for end in (said.names(config, "modules_to_not_convert") if given else ("lm_head",)))
    return Scheme("FP-Quant", name.upper(), {LINEAR: _storage(name)}, ignore)


def _storage(name: str) -> FP4Storage | Mismatch:
    if name not in FORMATS:
        return Mismatch(f"FP-Quant's {name}", f"forward_dtype {' or '.join(FORMATS)}")
    parts, kind, size = FORMATS[name]
    told = Activations("FP-Quant quantises the rotated inputs to FP4 (W4A4)")
    return FP4Storage(f"FP-Quant {name.upper()}", kind, (size,), parts, told)
