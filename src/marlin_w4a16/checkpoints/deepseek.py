"""Checkpoints of DeepSeek-V4 (``quant_method: fp8`` with ``expert_dtype: fp4``): experts in MXFP4.

Their scales are E8M0 bytes, or the same powers of two as float32. All other linears are FP8 in blocks of 128 x 128,
which transformers loads.
"""

from collections.abc import Mapping
from typing import Any

from marlin_w4a16.checkpoints.scheme import LINEAR, Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage, Part

EXPERTS = FP4Storage(
    "DeepSeek FP4",
    "e8m0",
    (32,),
    (
        Part("weight", "codes", ("I8", "U8"), ("n", "k/2")),
        Part("scale", "scales", ("F8_E8M0", "U8", "F32"), ("n", "k/g"), aliases=("weight_scale", "weight_scale_inv")),
    ),
)


def is_fp4(config: Mapping[str, Any], beside: Mapping[str, Any]) -> bool:
    """Whether experts are FP4.

    Args:
        config: the quantisation config, which says it in DeepSeek-V4.1.
        beside: the model's config, which says it in DeepSeek-V4.
    """
    return "fp4" in (str(values.get("expert_dtype")).lower() for values in (config, beside))


def scheme() -> Scheme:
    """What such a config says; FP8 linears are left to transformers."""
    return Scheme("DeepSeek", "FP8 with FP4 experts", {"*.experts.*": EXPERTS, LINEAR: None})
