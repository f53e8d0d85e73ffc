"""Why a checkpoint cannot be loaded of which this project reads no layer: FP4 or a config that nobody reads."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from marlin_w4a16.checkpoints import mlx, registry
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Problem

# Names that scales of FP4 have, and methods whose FP4 transformers runs itself.
_FP4_SCALES = (".weight_scale_2", ".weight_global_scale", ".comfy_quant", ".wscales", "_outer_scale_denominator")
_OF_BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit")
_OF_TRANSFORMERS = ("nvfp4", "fouroversix")
_OF_PACKAGES = ("quark", "auto-round", "fp_quant", "torchao")  # to which transformers hands what is not FP4


def unread(config: Mapping[str, Any], entries: Mapping[str, Entry]) -> Sequence[Problem]:
    """What is wrong with a checkpoint that is left to transformers, by its quantisation config and its tensors."""
    method = config.get("quant_method")
    if method in _OF_TRANSFORMERS:
        return ()
    is_named = isinstance(method, str) or config.get("load_in_8bit") or config.get("load_in_4bit")
    if config and not is_named and not mlx.is_mlx(config):
        return (Problem("config.json", "quantization_config.quant_method", repr(method)[:80], "a name"),)
    scales = next((name for name in entries if name.endswith(_FP4_SCALES)), None)
    if scales is None and _is_of_nobody(config):
        scales = registry.stray(method, entries)
    is_said = "fp4" in str(config).lower() and method not in _OF_BITSANDBYTES
    if scales is not None or is_said:
        producer = method or "a producer that no config names"
        expected = f"that of {', '.join(row.producer for row in registry.FORMATS)}"
        return (Problem(None, scales or "quantization_config", f"FP4 of {producer}, which is not read here", expected),)
    if find_spec("transformers") is None or method not in _OF_PACKAGES:
        return ()
    from marlin_w4a16.hf.fit import config_problem

    problem = config_problem(config)
    return () if problem is None else (problem,)


def _is_of_nobody(config: Mapping[str, Any]) -> bool:
    """Whether transformers, without FP4 layers, would take packed tensors for nothing."""
    method = config.get("quant_method")
    without_groups = method == "compressed-tensors" and not config.get("config_groups")
    if not config or without_groups or method in ("fp8", "mlx", *_OF_BITSANDBYTES):
        return True
    if mlx.is_mlx(config) or any(row.method == method for row in registry.FORMATS) or find_spec("transformers") is None:
        return False
    from marlin_w4a16.hf.fit import is_known

    return not is_known(method)  # type: ignore[arg-type]  # a name, or that of MLX
