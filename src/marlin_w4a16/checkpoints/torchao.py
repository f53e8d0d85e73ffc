"""Checkpoints of torchao (``quant_method: torchao``) in safetensors; read in version 0.18, saved by transformers 5.23.

Tensor classes are taken apart: the weight of ``a.b`` lies in ``a.b._weight_qdata``, ``a.b._weight_scale`` and maybe
more, and the headers' metadata say of which class it was, and whether its scales are swizzled.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from marlin_w4a16.checkpoints import said
from marlin_w4a16.checkpoints.files import CheckpointError, metadata_of
from marlin_w4a16.checkpoints.layouts import Layout
from marlin_w4a16.checkpoints.scheme import LINEAR, Scheme
from marlin_w4a16.checkpoints.storage import Activations, FP4Storage, Part

NVFP4 = FP4Storage(
    "torchao NVFP4Tensor",
    "e4m3",
    (16,),
    (
        Part("_weight_qdata", "codes", ("U8",), ("n", "k/2")),
        Part("_weight_scale", "scales", ("F8_E4M3",), ("n", "k/g")),
        Part("_weight_per_tensor_scale", "multiplier", ("F32",), optional=True),
        Part("_weight_act_per_tensor_scale", "unused", ("F32",), optional=True),
    ),
)
MXFP4 = FP4Storage(
    "torchao MXTensor",
    "e8m0",
    (32,),
    (
        Part("_weight_qdata", "codes", ("U8",), ("n", "k/2")),
        Part("_weight_scale", "scales", ("F8_E8M0", "U8"), ("n", "k/g")),
    ),
)
CLASSES = {"NVFP4Tensor": NVFP4, "MXTensor": MXFP4}
CONFIGS = {
    "NVFP4WeightOnlyConfig": NVFP4,
    "NVFP4DynamicActivationNVFP4WeightConfig": NVFP4,
    "MXDynamicActivationMXWeightConfig": MXFP4,
}
_FP4 = "float4_e2m1fn_x2"
Config = Mapping[str, Any]


def is_fp4(config: Config) -> bool:
    """Whether a quantisation config makes all linears FP4, and nothing else something else."""
    name, values = _quant_type(config)
    elements = values.get("weight_dtype") if name.startswith("MX") else {"_data": _FP4}
    is_e2m1 = isinstance(elements, Mapping) and elements.get("_data") == _FP4
    return name in CONFIGS and is_e2m1 and not config.get("include_input_output_embeddings")


def scheme(config: Config) -> Scheme:
    """What a quantisation config says; which layers it is of, and how their scales lie, `of_headers` adds."""
    name, _ = _quant_type(config)
    return Scheme("torchao", name.removesuffix("Config"), {LINEAR: CONFIGS[name]})


def of_headers(scheme: Scheme, files: Iterable[Path]) -> Scheme:
    """What the files say of each layer.

    Raises:
        CheckpointError: they say nothing, or name something else than the weights of linears in FP4.
    """
    listed = tuple(files)
    try:
        return _of_metadata(scheme, metadata(listed))
    except CheckpointError as error:
        where = ", ".join(file.name for file in listed[:4])
        raise CheckpointError(f"{where}: {error}") from error


def _of_metadata(scheme: Scheme, held: Mapping[str, str]) -> Scheme:
    if "tensor_names" not in held:
        raise CheckpointError("found no metadata of torchao in the headers, expected those that its safetensors have")
    named = {name: _parsed(name, held[name]) for name in _parsed("tensor_names", held["tensor_names"]) if name in held}
    typed = {name: one for name, one in named.items() if one.get("_type") != "Tensor"}
    return replace(scheme, targets={name.removesuffix(".weight"): _storage(name, one) for name, one in typed.items()})


def metadata(files: Iterable[Path]) -> dict[str, str]:
    """What the headers of all files hold beside their tensors; the names of tensors are those of all."""
    found, names = dict[str, str](), dict[str, None]()
    for file in files:
        held = metadata_of(file)
        names |= dict.fromkeys(_parsed("tensor_names", held.get("tensor_names", "[]")))
        found |= held
    return found | ({"tensor_names": json.dumps([*names])} if names else {})


def _quant_type(config: Config) -> tuple[str, Config]:
    """The name of a config of torchao and its values, as transformers writes it."""
    quant_type = config.get("quant_type")
    default = quant_type.get("default") if isinstance(quant_type, Mapping) else None
    if not isinstance(default, Mapping):
        return "", {}
    return str(default.get("_type")), said.mapping(default, "_data")


def _parsed(name: str, text: str) -> Any:
    """JSON of the metadata: a list of names, or what is said of one tensor."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list if name == "tensor_names" else dict):
        raise CheckpointError(f"{name}: found the metadata {text[:80]!r}, expected what torchao writes there")
    return found


def _storage(name: str, told_of: Config) -> FP4Storage:
    made, values = CLASSES.get(str(told_of.get("_type"))), said.mapping(told_of, "_data")
    elements = said.mapping(values, "elem_dtype").get("_data", _FP4)
    if made is None or elements != _FP4 or not name.endswith(".weight"):
        raise CheckpointError(
            f"{name}: found {told_of.get('_type')} of {elements}, expected the weight of a linear in FP4"
        )
    inputs = values.get("act_quant_kwargs")
    told = Activations("torchao quantises the inputs (W4A4)") if inputs else None
    return replace(made, activations=told, layout=Layout(tiles=bool(values.get("is_swizzled_scales"))))
