"""What a checkpoint means, read without the code under test: a plain model with decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hf.producers import Tensors, quantised_input
from marlin_w4a16 import FP4Weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = ("weight_packed", "weight")  # compressed-tensors, ModelOpt
NOT_THE_MODELS = ("_scale", "_scale_2", "weight_packed", "_global_scale")


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def codes_of(tensors: Tensors) -> dict[str, Tensor]:
    """The packed codes of each linear by its path, or its weight in FP8."""
    found = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in PACKED and tensor.dtype in (torch.uint8, torch.float8_e4m3fn):
            found[path] = tensor
    return found


def exact(tensors: Tensors, path: str) -> Tensor:
    """The weight of a quantised linear in float64, with the global scale in float32 as a factor."""
    codes, scale = codes_of(tensors)[path], tensors[f"{path}.weight_scale"]
    if codes.dtype == torch.float8_e4m3fn:
        return codes.double() * scale.double().reshape(-1, 1)
    factor = tensors.get(f"{path}.weight_scale_2", torch.ones(()))
    if (divisor := tensors.get(f"{path}.weight_global_scale")) is not None:
        factor = 1 / divisor
    kind = "e8m0" if scale.dtype == torch.uint8 else "e4m3"
    group = codes.shape[1] * 2 // scale.shape[1]
    rows = factor.float().reshape(1).expand(len(codes)).contiguous()
    return FP4Weight(codes, scale.view(torch.uint8), rows, kind, group).decode(torch.float64)


def pre_quant_scale(tensors: Tensors, path: str) -> Tensor | None:
    """What multiplies the input of a linear (AWQ)."""
    return tensors.get(f"{path}.pre_quant_scale")


def dense(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with dense weights, each rounded once to ``dtype``.

    Inputs are scaled as AWQ says, and quantised where transformers runs FP8 layers of compressed-tensors.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, config = tensors_of(folder), AutoConfig.from_pretrained(folder)
    quantised, producer = codes_of(tensors), config.quantization_config
    del config.quantization_config
    config.tie_word_embeddings &= "lm_head" not in quantised
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    state = {name: t for name, t in tensors.items() if not name.endswith(NOT_THE_MODELS)}
    state |= {f"{path}.weight": rounded(exact(tensors, path), dtype) for path in quantised}
    lacking, surplus = model.load_state_dict(state, strict=False)
    assert not surplus and lacking == (["lm_head.weight"] if config.tie_word_embeddings else [])
    for path, codes in quantised.items():
        if pre_quant_scale(tensors, path) is not None:
            before(model, path, partial(scaled, by=pre_quant_scale(tensors, path)))
        if codes.dtype == torch.float8_e4m3fn and producer["quant_method"] == "compressed-tensors":
            before(model, path, partial(quantised_input, tensors=tensors, path=path, config=producer))
    return model


def before(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the input of a module."""
    model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """In the dtype of the input."""
    return (x * by).to(x.dtype)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 once, to nearest even, by asking which of three neighbours is nearest."""
    near = exact.to(dtype)
    if dtype in (torch.float32, torch.float64):
        return near
    bits = near.view(torch.int16)
    choices = torch.stack([near, (bits - 1).view(dtype), (bits + 1).view(dtype)])
    wrong = (choices.double() - exact).abs().nan_to_num(torch.inf)
    odd = (choices.view(torch.int16) & 1).double()
    best = torch.where(wrong == wrong.amin(0), odd, 2).argmin(0, keepdim=True)
    return torch.where(near == 0, near, choices.gather(0, best)[0])


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative L2 error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
