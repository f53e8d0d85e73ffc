"""Weights in FP4 as integers, what they are exactly, and checkpoints of producers whose packages are not at hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints.published import each_expert, save

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
BETWEEN = (E2M1[1:8] + E2M1[:7]) / 2
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix, or one for each expert.

    Attributes:
        codes: ``[..., n, k]``, 0 to 15.
        scales: bytes ``[..., n, k / group]``, E4M3 where ``e4m3``, else E8M0.
        factor: what multiplies all.
    """

    codes: Tensor
    scales: Tensor
    factor: float
    e4m3: bool

    def exact(self) -> Tensor:
        """What it is, in float64."""
        scales = self.scales.view(torch.float8_e4m3fn).double() if self.e4m3 else (self.scales.double() - 127).exp2()
        group = self.codes.shape[-1] // self.scales.shape[-1]
        return E2M1[self.codes] * scales.repeat_interleave(group, -1) * self.factor

    def low_first(self) -> Tensor:
        """Two codes in a byte."""
        return (self.codes[..., ::2] | self.codes[..., 1::2] << 4).to(torch.uint8)


def coded(weight: Tensor, e4m3: bool = False, factor: float | None = None, rows: int = 1) -> Codes:
    """A weight in MXFP4 or NVFP4.

    Args:
        factor: the global scale; None: what NVFP4 makes of the largest value.
        rows: how many share their scales.
    """
    group, dense = 16 if e4m3 else 32, weight.double()
    if factor is None:
        factor = float((dense.abs().max() / (448 * 6)).float()) if e4m3 else 1.0
    blocks = dense.unflatten(-1, (-1, group)) / factor
    largest = blocks.abs().amax(-1)
    if rows > 1:
        largest = torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in largest.split(rows)])
    if e4m3:
        held = (largest / 6).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        scales, step = held.view(torch.uint8), held.double()
    else:
        exponent = largest.log2().floor().clamp(-120, 120) - 2
        scales, step = (exponent + 127).to(torch.uint8), exponent.exp2()
    codes = torch.bucketize((blocks.abs() / step.unsqueeze(-1)).contiguous(), BETWEEN) + 8 * blocks.signbit()
    return Codes(codes.flatten(-2), scales, factor, e4m3)


Layers = Callable[[str, Tensor], tuple[Tensors, Tensor] | None]


def write(model: Any, folder: Path, config: dict[str, Any], layers: Layers, stacked: bool = False) -> Any:
    """Writes a checkpoint.

    Args:
        model: becomes the model that the checkpoint is exactly, rounded to its dtype.
        config: of the quantisation.
        layers: of the path of a linear and its weight makes the tensors by leaf and the exact weight; None: it stays.
        stacked: leave the experts of a layer in one tensor for each projection, whose path is ``experts.gate_proj``.

    Returns:
        The model.
    """
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors, exact = Tensors(), Tensors()
    for name, weight in (in_stacks(state) if stacked else each_expert(state)).items():
        path, _, leaf = name.rpartition(".")
        found = layers(path, weight) if leaf == "weight" and weight.ndim > 1 else None
        tensors |= {name: weight} if found is None else {f"{path}.{key}": tensor for key, tensor in found[0].items()}
        exact[name] = weight if found is None else found[1].to(weight.dtype)
    save(model, folder, tensors, "5GB", quantization_config=config)
    fused = Tensors()
    for name in state:
        path, _, leaf = name.rpartition(".")
        if name not in exact:
            parts = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
            numbers = [""] if stacked else [f"{i}." for i in range(len(state[name]))]
            whole = [torch.cat([exact[f"{path}.{i}{part}.weight"] for part in parts], -2) for i in numbers]
            fused[name] = whole[0] if stacked else torch.stack(whole)
    model.load_state_dict({name: exact.get(name, fused.get(name)) for name in state}, strict=False)
    return model


def in_stacks(state: Tensors) -> Tensors:
    """With a tensor for each projection of all experts."""
    found = Tensors()
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        if not path.endswith(".experts"):
            found[name] = tensor
            continue
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        found |= {f"{path}.{n}.weight": t for n, t in zip(names, tensor.chunk(len(names), 1), strict=True)}
    return found


def quark(e4m3: bool = False, rows: int = 1) -> tuple[dict[str, Any], Layers]:
    """AMD Quark: MXFP4 with inputs in MXFP4, or NVFP4."""
    fp4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0",
           "is_dynamic": False}  # fmt: skip
    weight: Any = fp4 | ({"group_size": None, "qscheme": "per_block", "block_size": [rows, 32]} if rows > 1 else {})
    inputs: Any = {**fp4, "is_dynamic": True, "scale_calculation_mode": "even"}
    if e4m3:
        global_scale = {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_scale_quant": True}
        weight, inputs = [{**fp4, "group_size": 16, "scale_format": None}, global_scale], None
    config = {
        "quant_method": "quark", "global_quant_config": {"weight": weight, "input_tensors": inputs},
        "layer_quant_config": {"*layers.1*o_proj": {"weight": None}}, "layer_type_quant_config": {},
        "exclude": ["lm_head", "*.mlp.gate"], "export": {"weight_format": "real_quantized", "pack_method": "reorder"},
    }  # fmt: skip

    def layers(path: str, dense: Tensor) -> tuple[Tensors, Tensor] | None:
        if path.endswith(("lm_head", "embed_tokens", "mlp.gate", "layers.1.self_attn.o_proj")):
            return None
        made = coded(dense, e4m3, rows=rows)
        scales = made.scales.view(torch.float8_e4m3fn) if e4m3 else made.scales[::rows]
        factor = {"weight_scale_2": torch.tensor(made.factor)} if e4m3 else {}
        return {"weight": made.low_first(), "weight_scale": scales, **factor}, made.exact()

    return config, layers


def auto_round(e4m3: bool = False) -> tuple[dict[str, Any], Layers]:
    """Intel AutoRound, with its input scales in NVFP4."""
    data_type = "nv_fp4_with_static_gs" if e4m3 else "mx_fp"
    config = {
        "quant_method": "auto-round", "bits": 4, "group_size": 16 if e4m3 else 32, "sym": True, "act_bits": 4,
        "data_type": "nv_fp" if e4m3 else "mx_fp", "act_data_type": data_type, "iters": 0,
        "packing_format": f"auto_round:{data_type}", "block_name_to_quantize": "model.layers",
        "extra_config": {
            "model.layers.1.mlp.down_proj": {"bits": 16, "data_type": "fp"},
            r".*mlp\.gate$": {"bits": 16, "data_type": "fp"},
        },
    }  # fmt: skip

    def layers(path: str, dense: Tensor) -> tuple[Tensors, Tensor] | None:
        if path.endswith(("lm_head", "embed_tokens", "mlp.gate")) or path == "model.layers.1.mlp.down_proj":
            return None
        made = coded(dense, e4m3)
        if not e4m3:
            return {"weight_packed": made.low_first(), "weight_scale": made.scales}, made.exact()
        divisor = torch.tensor([1 / made.factor])
        exact = made.exact() / made.factor * (1 / divisor).double()
        tensors = {"weight_packed": made.low_first(), "weight_scale": made.scales.view(torch.float8_e4m3fn),
                   "weight_global_scale": divisor, "input_global_scale": torch.tensor([321.5])}  # fmt: skip
        return tensors, exact

    return config, layers


def fp_quant(e4m3: bool = False, side: int = 32) -> tuple[dict[str, Any], Layers]:
    """FP-Quant, with a rotation that is not its own inverse."""
    divisor = 10.0 if e4m3 else 3.0
    config = {
        "quant_method": "fp_quant", "forward_dtype": "nvfp4" if e4m3 else "mxfp4", "forward_method": "abs_max",
        "backward_dtype": "bf16", "hadamard_group_size": side, "pseudoquantization": False,
        "store_master_weights": False, "transform_init": "gsr", "modules_to_not_convert": ["lm_head", "k_proj"],
    }  # fmt: skip
    matrix = torch.ones(1, 1)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    order = matrix.diff(dim=0).ne(0).sum(0).argsort()
    matrix = (matrix[:, order] * side**-0.5).bfloat16()

    def layers(path: str, dense: Tensor) -> tuple[Tensors, Tensor] | None:
        if path.endswith(("lm_head", "embed_tokens", "k_proj")):
            return None
        rotated = dense.double().unflatten(-1, (-1, side)) @ matrix.double()
        made = coded(rotated.flatten(-2), e4m3, float(torch.tensor(divisor).reciprocal()))
        exact = (made.exact().unflatten(-1, (-1, side)) @ matrix.double().T).flatten(-2)
        scale = torch.tensor([divisor]).bfloat16()
        return {
            "qweight": made.low_first(), "scales": made.scales, "weight_global_scale": scale,
            "act_global_scale": scale.clone(), "forward_hadamard_matrix": matrix.clone(),
            "backward_hadamard_matrix": matrix.clone(), "weight": torch.zeros(0), "dqweight": torch.zeros(0),
        }, exact  # fmt: skip

    return config, layers


def torchao(e4m3: bool = False, tiles: bool = True) -> tuple[dict[str, Any], Layers]:
    """torchao, as if its package were there; `headers` adds what its headers say."""
    name, values = "NVFP4WeightOnlyConfig", {"use_dynamic_per_tensor_scale": True}
    if not e4m3:
        name = "MXDynamicActivationMXWeightConfig"
        values = {"weight_dtype": {"_type": "torch.dtype", "_data": "float4_e2m1fn_x2"}, "block_size": 32}
    config = {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_data": values, "_version": 1}},
              "include_input_output_embeddings": False, "modules_to_not_convert": None}  # fmt: skip

    def layers(path: str, dense: Tensor) -> tuple[Tensors, Tensor] | None:
        if path.endswith(("lm_head", "embed_tokens")):
            return None
        made = coded(dense, e4m3)
        scales = in_tiles(made.scales) if tiles else made.scales
        factor = {"_weight_per_tensor_scale": torch.tensor(made.factor)} if e4m3 else {}
        dtype = torch.float8_e4m3fn if e4m3 else torch.float8_e8m0fnu
        return {"_weight_qdata": made.low_first(), "_weight_scale": scales.view(dtype), **factor}, made.exact()

    return config, layers


def in_tiles(scales: Tensor) -> Tensor:
    """Tiles of 128 rows by 4 columns, one by one: in a tile rows 0, 32, 64 and 96 stand side by side."""
    rows, columns = scales.shape
    across = -(-columns // 4)
    out = torch.zeros(-(-rows // 128), across, 32, 16, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            out[row // 128, column // 4, row % 32, row % 128 // 32 * 4 + column % 4] = scales[row, column]
    return out.view(-(-rows // 128) * 32, across * 16)


def headers(folder: Path, tiles: bool = True) -> None:
    """Writes the metadata of torchao into the header."""
    file = folder / "model.safetensors"
    tensors, said = load_file(file), {}
    for name, tensor in tensors.items():
        if name.endswith("_weight_qdata"):
            kind = "NVFP4Tensor" if tensors[name.replace("qdata", "scale")].dtype == torch.float8_e4m3fn else "MXTensor"
            elements = {"elem_dtype": {"_type": "torch.dtype", "_data": "float4_e2m1fn_x2"}}
            one = {"_type": kind, "_data": {"is_swizzled_scales": tiles, **(elements if kind == "MXTensor" else {})}}
            said[name.replace("._weight_qdata", ".weight")] = json.dumps(one)
        elif "._weight" not in name:
            said[name] = json.dumps({"_type": type(tensor).__name__})
    save_file(tensors, file, {"format": "pt", "tensor_names": json.dumps([*said]), **said})


def changed(folder: Path, **entries: Any) -> Path:
    """The folder, other things in the quantisation config of its config.json."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= entries
    (folder / "config.json").write_text(json.dumps(config))
    return folder
