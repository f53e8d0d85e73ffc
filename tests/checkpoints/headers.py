"""Headers of tensors, held against a scheme without any file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlin_w4a16.checkpoints import compressed_tensors, modelopt
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Contents, Layer, contents
from marlin_w4a16.checkpoints.scheme import Scheme

Tensor = tuple[str, tuple[int, ...]]
UP = "model.layers.0.mlp.up_proj"


def hold(scheme: Scheme, **modules: dict[str, Tensor | None]) -> Contents:
    """The tensors of modules; None: not there."""
    named = {f"{path}.{leaf}": t for path, tensors in modules.items() for leaf, t in tensors.items() if t is not None}
    return contents({name: Entry(Path("folder/x.safetensors"), *tensor) for name, tensor in named.items()}, scheme)


def problem(scheme: Scheme, tensors: dict[str, Tensor | None], path: str = UP) -> str:
    """The one thing that is wrong; the tensors belong to no layer."""
    held = hold(scheme, **{path: tensors})
    assert not held.layers and held.others.keys() == {f"{path}.{leaf}" for leaf, t in tensors.items() if t is not None}
    (found,) = held.problems
    return str(found)


def fields(config: Mapping[str, Any]) -> Fields:
    """A quantisation config, as the readers take it."""
    return Fields(config, "config.json: quantization_config")


def of_modelopt(algorithm: str, **more: Any) -> Scheme:
    """A scheme of ModelOpt."""
    return modelopt.scheme(fields({"quant_algo": algorithm, "ignore": ["lm_head"], **more}))


def of_compressed(*groups: tuple[str, str]) -> Scheme:
    """A scheme of compressed-tensors by formats and targets."""
    made = {f"group_{i}": {"format": name, "targets": [target]} for i, (name, target) in enumerate(groups)}
    return compressed_tensors.scheme(fields({"config_groups": made, "ignore": ["lm_head"]}))


SCALES, CODES, ONE = ("F8_E4M3", (4, 4)), ("U8", (4, 32)), ("F32", ())
DENSE: dict[str, Tensor] = {"weight": ("BF16", (4, 64))}
NVFP4 = of_modelopt("NVFP4"), {"weight": CODES, "weight_scale": SCALES, "weight_scale_2": ONE}
MXFP4 = of_modelopt("mxfp4"), {"weight": CODES, "weight_scale": ("U8", (4, 2))}
SVD = of_modelopt("NVFP4_SVD")
FP8 = of_modelopt("FP8"), {"weight": ("F8_E4M3", (4, 64)), "weight_scale": ONE}
CT_NVFP4 = (
    of_compressed(("nvfp4-pack-quantized", "Linear")),
    {"weight_packed": CODES, "weight_scale": SCALES, "weight_global_scale": ("F32", (1,))},
)
CT_MXFP4 = (of_compressed(("mxfp4-pack-quantized", "Linear")), {"weight_packed": CODES, "weight_scale": ("U8", (4, 2))})
ALL = {"nvfp4": NVFP4, "mxfp4": MXFP4, "fp8": FP8, "ct-nvfp4": CT_NVFP4, "ct-mxfp4": CT_MXFP4}


def layer(scheme: Scheme, tensors: dict[str, Tensor | None]) -> tuple[Layer, Mapping[str, Entry]]:
    """The layer that some tensors are, and what is beside it."""
    held = hold(scheme, **{UP: tensors})
    assert not held.problems
    (found,) = held.layers.values()
    return found, held.others
