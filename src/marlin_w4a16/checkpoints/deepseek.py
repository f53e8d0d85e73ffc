"""Checkpoints of DeepSeek-V4 (``quant_method: fp8`` with ``expert_dtype: fp4``): experts in MXFP4, or in NVFP4.

Scales of MXFP4 are E8M0 bytes, or the same powers of two as float32. NVFP4 experts are NVIDIA's: they are named by
``quantized_layers``, or all of them by ``moe_quant_algo``, and ``expert_dtype`` may say fp4 as well. All other linears
are FP8 in blocks of 128 x 128, which transformers loads.
"""

from marlin_w4a16.checkpoints import modelopt
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.fp8 import Storage
from marlin_w4a16.checkpoints.scheme import LINEAR, Mismatch, Scheme
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
_EVERY = "*.experts.*"


def is_fp4(config: Fields, beside: Fields) -> bool:
    """Whether experts are FP4.

    Args:
        config: the quantisation config, which says it in DeepSeek-V4.1.
        beside: the model's config, which says it in DeepSeek-V4.
    """
    dtypes = (str(values.values.get("expert_dtype")).lower() for values in (config, beside))
    return "fp4" in dtypes or bool(_of_modelopt(config))


def scheme(config: Fields) -> Scheme:
    """What such a config says; FP8 linears are left to transformers."""
    named = _of_modelopt(config)
    algorithm = "FP8 with NVFP4 experts" if named else "FP8 with FP4 experts"
    targets = {**named, _EVERY: next(iter(named.values()), EXPERTS), LINEAR: None}
    return Scheme("DeepSeek", algorithm, targets, known=(EXPERTS, *modelopt.KNOWN[:1]), where=config.where)


def _of_modelopt(config: Fields) -> dict[str, Storage | Mismatch | None]:
    """The experts that a config names by algorithms of ModelOpt."""
    layers = config.each("quantized_layers")
    named = {path: modelopt.storage((layer.text("quant_algo") or "").upper()) for path, layer in layers.items()}
    if not named and config.has("moe_quant_algo"):
        named = {_EVERY: modelopt.storage((config.text("moe_quant_algo") or "").upper())}
    return {path: storage for path, storage in named.items() if isinstance(storage, FP4Storage | Mismatch)}
