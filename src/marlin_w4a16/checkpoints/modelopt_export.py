"""Packed weights as the tensors and the config of a checkpoint of NVIDIA ModelOpt, weights alone quantised."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.kernels.fp4 import FP4Weight, format_name

_ALGORITHMS = {("e4m3", 16): "W4A16_NVFP4", ("e8m0", 32): "MXFP4"}
_E8M0_LAST = 254  # 255 is NaN


def exported(weight: FP4Weight, path: str) -> dict[str, Tensor]:
    """The tensors of one matrix by leaf, on the CPU.

    Args:
        weight: ``[n, k]``; of NVFP4, all rows with one multiplier.
        path: what an error calls it.

    Raises:
        CheckpointError: ModelOpt has no such format.
    """
    codes, scales, multiplier = (t.cpu() for t in (weight.codes, weight.scales, weight.multiplier))
    algorithm_of(weight, path)
    if weight.kind == "e8m0":
        return {"weight": codes, "weight_scale": _whole_scales(weight, path).cpu()}
    if bool((multiplier != multiplier[:1]).any()):
        raise CheckpointError(f"{path}: found a multiplier for each row, expected one for all, as ModelOpt has")
    return {"weight": codes, "weight_scale": scales.view(torch.float8_e4m3fn), "weight_scale_2": multiplier[0].clone()}


def algorithm_of(weight: FP4Weight, path: str) -> str:
    """The ``quant_algo`` of a weight.

    Raises:
        CheckpointError: there is none.
    """
    found = _ALGORITHMS.get((weight.kind, weight.group))
    if found is None:
        format = format_name(weight.kind, weight.group)
        raise CheckpointError(f"{path}: found {format}, expected NVFP4 group 16 or MXFP4 group 32")
    return found


def config(algorithms: Mapping[str, str], ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config``.

    Args:
        algorithms: those of the quantised weights, by path.
        ignore: the paths of linears that are dense.
    """
    values = {"quant_method": "modelopt", "ignore": sorted(set(ignore))}
    found = set(algorithms.values())
    if len(found) == 1:
        return {**values, **_layer(found.pop())}
    return {
        **values,
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {path: _layer(algorithm) for path, algorithm in algorithms.items()},
    }


def _layer(algorithm: str) -> dict[str, Any]:
    return {"quant_algo": algorithm, "group_size": 32 if algorithm == "MXFP4" else 16}


def _whole_scales(weight: FP4Weight, path: str) -> Tensor:
    """E8M0 bytes that hold the powers of two, too, that packing moved into the multipliers (see `FP4Weight.fit`)."""
    mantissa, exponent = torch.frexp(weight.multiplier)
    scales = weight.scales.int() + (exponent - 1)[:, None]
    zeros = (weight.codes.view(weight.n, -1, weight.group // 2) & 0x77 == 0).all(-1)  # whose scale is free
    scales = torch.where(zeros, scales.clamp(0, _E8M0_LAST), scales)
    if bool((mantissa != 0.5).any()) or bool(((scales < 0) | (scales > _E8M0_LAST)).any()):
        raise CheckpointError(f"{path}: found multipliers that E8M0 scales cannot hold, expected powers of two")
    return scales.byte()
