"""Inputs of linears as the producers' own code quantises them, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from checkpoints.modelopt import fake_quantise

Tensors = dict[str, Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantised_input(x: Tensor, tensors: Tensors, path: str, config: dict) -> Tensor:
    """What a linear multiplies with its weight, pre-quant scale included."""
    if config["quant_method"] == "modelopt":
        return of_modelopt(x, tensors, path)
    arguments = [g["input_activations"] for g in config["config_groups"].values() if matches(path, g["targets"])]
    return of_compressed(x, arguments[0], tensors.get(f"{path}.input_global_scale")) if arguments[0] else x


def matches(path: str, targets: list[str]) -> bool:
    from compressed_tensors.utils.match import match_name

    return targets == ["Linear"] or any(match_name(path, target) for target in targets)


def of_compressed(x: Tensor, arguments: dict, divisor: Tensor | None) -> Tensor:
    """The forward of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    module = nn.Module()
    module.input_global_scale, module.quantization_status = divisor, QuantizationStatus.FROZEN
    return forward_quantize(module, x, "input", QuantizationArgs(**arguments))


def of_modelopt(x: Tensor, tensors: Tensors, path: str) -> Tensor:
    """ModelOpt's formulas: NVFP4 by its own code, FP8 and MXFP4 by what its kernels compute."""
    scale, codes = tensors.get(f"{path}.input_scale"), tensors[f"{path}.weight"]
    if codes.dtype == torch.float8_e4m3fn:
        from modelopt.torch.quantization.tensor_quant import scaled_e4m3

        return scaled_e4m3(x, scale * 448, None, 4, 3)
    if (by := tensors.get(f"{path}.pre_quant_scale")) is not None:
        x = (x * by).to(x.dtype)
    block_scales = tensors[f"{path}.weight_scale"]
    if block_scales.dtype == torch.uint8:
        return mxfp4(x)
    return x if scale is None else fake_quantise(x, codes.shape[1] * 2 // block_scales.shape[1], scale * 6 * 448)


def mxfp4(x: Tensor) -> Tensor:
    """tensor_quant_mx.cu: a scale of ``2 ** ceil(log2(amax / 6))``, nearest values of E2M1, ties to the even code."""
    blocks = x.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    steps = torch.where(amax > 0, torch.exp2(torch.ceil(torch.log2(amax / 6))), 1.0)
    distance = ((blocks.abs() / steps).unsqueeze(-1) - E2M1.double()).abs()
    code = torch.where(distance == distance.amin(-1, keepdim=True), torch.arange(8) % 2, 2).argmin(-1)
    return (E2M1.double()[code] * blocks.sign() * steps).flatten(-2).to(x.dtype)
