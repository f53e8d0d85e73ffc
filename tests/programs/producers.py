"""FP4 products as the code of ModelOpt, torchao, compressed-tensors and transformers writes them.

A producer is imported when one of its forms is built. Those of ModelOpt need torch 2.13: the Dynamo of 2.11 and 2.12
cannot trace its modules, for any backend.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import quantize_mxfp4, quantize_nvfp4
from programs.program import Program
from swaps import MLP

N, K = 144, 96  # neither fills torchao's tiles of scales
EXPERTS = 3
Built = tuple[nn.Module, tuple[Tensor, ...]]


def in_both(name: str, section: str, build: Callable[..., Built], *args: Any, **expect: Any) -> list[Program]:
    """The form in bfloat16 and in float32."""
    return [
        Program(f"{name}, {str(dtype)[6:]}", section, partial(build, *args, dtype), dtype=dtype, **expect)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def modelopt(config: str, group: int | None, activations: bool, dtype: torch.dtype) -> Built:
    """What ``mtq.compress`` leaves of a model."""
    import modelopt.torch.quantization as mtq

    model, x = MLP().to(dtype), torch.randn(2, 3, 64, dtype=dtype)
    chosen = copy.deepcopy(getattr(mtq, config))
    for entry in chosen["quant_cfg"]:
        if group is not None and entry["quantizer_name"] == "*weight_quantizer":
            entry["cfg"]["block_sizes"][-1] = group
    if not activations:
        chosen["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    mtq.quantize(model, chosen, lambda m: m(x))
    mtq.compress(model)
    return model, (x,)


def modelopt_restored(config: str, dtype: torch.dtype) -> Built:
    import modelopt.torch.opt as mto

    model, inputs = modelopt(config, None, False, dtype)
    with tempfile.TemporaryDirectory() as folder:
        mto.save(model, f"{folder}/model.pt")
        return mto.restore(MLP().to(dtype), f"{folder}/model.pt"), inputs


def modelopt_w4a4(config: str, dtype: torch.dtype) -> Built:
    """ModelOpt's kernels that quantise activations need CUDA: here its operator has another one, as long as the model
    lives. It looks for TensorRT-LLM in the first call, which Dynamo cannot trace."""
    model, inputs = modelopt(config, None, True, dtype)
    model.kernel = torch.library.Library("tensorrt", "IMPL")
    model.kernel.impl("dynamic_block_quantize_op", lambda x, *_: (x * 2).round() / 2, "CPU", allow_override=True)
    with torch.no_grad():
        model(*inputs)
    return model, inputs


def nvfp4(dense: Tensor, tensor_scale: bool = True, **choices: Any) -> Tensor:
    """A weight of torchao."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    axes = tuple(range(dense.ndim))[-2:]
    scale = per_tensor_amax_to_scale(dense.abs().amax(axes, keepdim=dense.ndim > 2)) if tensor_scale else None
    return NVFP4Tensor.to_nvfp4(dense, per_tensor_scale=scale, **choices)


def mxfp4(dense: Tensor, **choices: Any) -> Tensor:
    """A weight of torchao."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(dense, torch.float4_e2m1fn_x2, 32, **choices)


def mxfp4_w4a4(dense: Tensor) -> Tensor:
    """A weight of torchao whose products quantise their input, though no node says so."""
    from torchao.prototype.mx_formats.mx_tensor import QuantizeTensorToMXKwargs

    return mxfp4(dense, act_quant_kwargs=QuantizeTensorToMXKwargs(elem_dtype=torch.float4_e2m1fn_x2))


class Torchao(nn.Module):
    def __init__(self, weight: Tensor, multiply: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(weight.shape[-2], dtype=dtype), requires_grad=False)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias)


def torchao(
    quantise: Callable[[Tensor], Tensor], multiply: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype
) -> Built:
    return Torchao(quantise(torch.randn(N, K, dtype=dtype)), multiply, dtype), (torch.randn(5, K, dtype=dtype),)


def torchao_config(tensor_scale: bool, bias: bool, dtype: torch.dtype) -> Built:
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(K, N, bias=bias)).to(dtype)
    quantize_(model, NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=tensor_scale))
    return model, (torch.randn(2, 3, K, dtype=dtype),)


def under_autocast(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torchao decodes to the dtype of autocast at once, whatever the weight's own dtype."""

    def multiply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return linear(x, weight, bias)

    return multiply


def torchao_experts(multiply: Callable[[Tensor, Tensor], Tensor]) -> Built:
    dense = torch.randn(EXPERTS, N, K, dtype=torch.bfloat16)
    module = Torchao(nvfp4(dense), lambda x, weight, bias: multiply(x, weight), torch.bfloat16)
    return module, (torch.randn(EXPERTS, 5, K, dtype=torch.bfloat16),)


def each_expert(x: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([linear(x[e], weights[e]) for e in range(EXPERTS)])


class CompressedTensors(nn.Module):
    """A packed linear that calls the library's own functions in its forward."""

    def __init__(self, scheme: str, dtype: torch.dtype) -> None:
        from compressed_tensors.compressors.mx_utils import decompress_mx_scale
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import preset_name_to_scheme
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        super().__init__()
        self.args, self.dtype = preset_name_to_scheme(scheme, ["Linear"]).weights, dtype
        self.unpack, self.dequantize = unpack_fp4_from_uint8, dequantize
        self.decompress_scale: Callable[..., Tensor] = lambda scale, dtype: scale.to(dtype)
        if scheme == "NVFP4A16":
            weight = quantize_nvfp4(torch.randn(N, K))
            scales, divisor = weight.scales.view(torch.float8_e4m3fn), weight.multiplier[:1].reciprocal()
        else:
            weight, divisor = quantize_mxfp4(torch.randn(N, K)), None
            scales, self.decompress_scale = weight.scales, lambda scale, dtype: decompress_mx_scale(scale).to(dtype)
        self.weight_packed = nn.Parameter(weight.codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.weight_global_scale = divisor if divisor is None else nn.Parameter(divisor, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.weight_packed.shape
        weight = self.dequantize(
            self.unpack(self.weight_packed, rows, 2 * columns, dtype=self.dtype),
            self.decompress_scale(self.weight_scale, self.dtype),
            args=self.args,
            global_scale=self.weight_global_scale,
            dtype=self.dtype,
        )
        return linear(x, weight)


def compressed_tensors(scheme: str, dtype: torch.dtype) -> Built:
    return CompressedTensors(scheme, dtype), (torch.randn(2, 3, K, dtype=dtype),)


class GptOss(nn.Module):
    """Experts that are converted in the forward, dense: every token goes to all of them."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        super().__init__()
        self.convert, self.multiply, self.dtype = convert_moe_packed_tensors, multiply, dtype
        for name, rows, columns in (("gate_up_proj", 2 * K, 64), ("down_proj", 64, K)):
            weights = [quantize_mxfp4(torch.randn(rows, columns)) for _ in range(EXPERTS)]
            blocks = torch.stack([weight.codes.unflatten(-1, (-1, 16)) for weight in weights])
            scales = torch.stack([weight.scales for weight in weights])
            self.register_parameter(f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
            self.register_parameter(f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.convert(self.gate_up_proj_blocks, self.gate_up_proj_scales, dtype=self.dtype)
        down = self.convert(self.down_proj_blocks, self.down_proj_scales, dtype=self.dtype)
        gate, up = self.multiply(x.expand(EXPERTS, -1, -1), gate_up).unflatten(-1, (-1, 2)).unbind(-1)
        return self.multiply(gate.sigmoid() * up, down).sum(0)


def gpt_oss(multiply: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Built:
    return GptOss(multiply, dtype), (torch.randn(5, 64, dtype=dtype),)


def by_index(x: Tensor, weights: Tensor) -> Tensor:
    """``weights`` are ``[experts, k, n]``."""
    return torch.stack([x[e] @ weights[e] for e in range(EXPERTS)])


def by_linear(x: Tensor, weights: Tensor) -> Tensor:
    """``weights`` are ``[experts, k, n]``."""
    return torch.stack([linear(x[e], weights[e].t()) for e in range(EXPERTS)])


of_modelopt = partial(in_both, section="ModelOpt", weights=2)
of_torchao = partial(in_both, section="torchao")
of_gpt_oss = partial(in_both, section="transformers")

FORMS = [
    *of_modelopt("W4A16_NVFP4_CFG", build=partial(modelopt, "W4A16_NVFP4_CFG", None, False)),
    *of_modelopt("NVFP4_DEFAULT_CFG, inputs left alone", build=partial(modelopt, "NVFP4_DEFAULT_CFG", None, False)),
    *of_modelopt("MXFP4_DEFAULT_CFG, inputs left alone", build=partial(modelopt, "MXFP4_DEFAULT_CFG", None, False)),
    *of_modelopt("E4M3 scales of groups of 32", build=partial(modelopt, "W4A16_NVFP4_CFG", 32, False)),
    *of_modelopt("NVFP4, restored", build=partial(modelopt_restored, "W4A16_NVFP4_CFG")),
    *of_modelopt("MXFP4, restored", build=partial(modelopt_restored, "MXFP4_DEFAULT_CFG")),
    *of_modelopt("NVFP4_DEFAULT_CFG, inputs quantised", build=partial(modelopt_w4a4, "NVFP4_DEFAULT_CFG")),
    *of_modelopt("MXFP4_DEFAULT_CFG, inputs quantised", build=partial(modelopt_w4a4, "MXFP4_DEFAULT_CFG")),
    *of_torchao("NVFP4WeightOnlyConfig", build=partial(torchao_config, True, True)),
    *of_torchao("NVFP4WeightOnlyConfig, no bias", build=partial(torchao_config, True, False)),
    *of_torchao("NVFP4WeightOnlyConfig, no tensor scale", build=partial(torchao_config, False, True)),
    *of_torchao("NVFP4Tensor, scales in rows", build=partial(torchao, nvfp4, linear)),
    *of_torchao("NVFP4Tensor, scales in rows, no tensor scale",
                build=partial(torchao, partial(nvfp4, tensor_scale=False), linear)),
    *of_torchao("x @ NVFP4Tensor.t()", build=partial(torchao, nvfp4, lambda x, w, b: x @ w.t())),
    *of_torchao("mm(x, NVFP4Tensor.t())", build=partial(torchao, nvfp4, lambda x, w, b: torch.mm(x, w.t()))),
    *of_torchao("addmm(bias, x, NVFP4Tensor.t())",
                build=partial(torchao, nvfp4, lambda x, w, b: torch.addmm(b, x, w.t()))),
    *of_torchao("NVFP4Tensor.dequantize()",
                build=partial(torchao, nvfp4, lambda x, w, b: linear(x, w.dequantize(), b))),
    *of_torchao("NVFP4Tensor.dequantize(), swizzled scales", build=partial(
        torchao, partial(nvfp4, is_swizzled_scales=True), lambda x, w, b: linear(x, w.dequantize(), b))),
    *of_torchao("NVFP4Tensor.detach()", build=partial(torchao, nvfp4, lambda x, w, b: linear(x, w.detach(), b))),
    *of_torchao("NVFP4Tensor under autocast", build=partial(torchao, nvfp4, under_autocast(torch.bfloat16))),
    *of_torchao("NVFP4Tensor under autocast to float16", build=partial(torchao, nvfp4, under_autocast(torch.float16))),
    *of_torchao("NVFP4Tensor in two products",
                build=partial(torchao, nvfp4, lambda x, w, b: linear(x, w, b) + linear(x + 1, w))),
    *of_torchao("NVFP4Tensor in products of two spellings",
                build=partial(torchao, nvfp4, lambda x, w, b: linear(x, w, b) + (x + 1) @ w.t()), weights=2),
    *of_torchao("NVFP4Tensor in a product and beside it",
                build=partial(torchao, nvfp4, lambda x, w, b: linear(x, w, b) + w.dequantize().sum(1))),
    *of_torchao("MXTensor.dequantize()", build=partial(torchao, mxfp4, lambda x, w, b: linear(x, w.dequantize(), b))),
    *of_torchao("MXTensor.dequantize(), swizzled scales", build=partial(
        torchao, partial(mxfp4, is_swizzled_scales=True), lambda x, w, b: linear(x, w.dequantize(), b))),
    *of_torchao("MXTensor, inputs quantised", build=partial(torchao, mxfp4_w4a4, linear), outcome="refused",
                reason="quantises the input"),
    *in_both("nvfp4-pack-quantized", "compressed-tensors", partial(compressed_tensors, "NVFP4A16")),
    *in_both("mxfp4-pack-quantized", "compressed-tensors", partial(compressed_tensors, "MXFP4A16")),
    *of_gpt_oss("gpt-oss, an expert by its index", build=partial(gpt_oss, by_index), weights=2 * EXPERTS),
    *of_gpt_oss("gpt-oss, F.linear of an expert", build=partial(gpt_oss, by_linear), weights=2 * EXPERTS),
    *of_gpt_oss("gpt-oss, bmm", build=partial(gpt_oss, torch.bmm), weights=2),
    *of_gpt_oss("gpt-oss, matmul", build=partial(gpt_oss, torch.matmul), weights=2),
]  # fmt: skip

# Right, replaced or not.
RIGHT = {
    "torchao, F.linear of an expert": partial(torchao_experts, each_expert),
    "torchao, bmm of experts": partial(torchao_experts, lambda x, w: torch.bmm(x, w.transpose(-2, -1))),
    "torchao, a dequantised weight whose products would quantise their inputs": partial(
        torchao, mxfp4_w4a4, lambda x, w, b: linear(x, w.dequantize(), b), torch.bfloat16),
    "torchao, F.linear of a dequantised expert": partial(torchao_experts, lambda x, w: each_expert(x, w.dequantize())),
}  # fmt: skip
