"""What a checkpoint means, read without the code under test: a plain model with decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from checkpoints.models import as_loaded
from checkpoints.names import renamed
from hf.dense_experts import fused, is_expert, unstacked
from hf.producers import Tensors, quantised_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = ("weight_packed", "weight")  # compressed-tensors, all others
QUANTISED = (torch.uint8, torch.int8, torch.float8_e4m3fn)
SCALES = ("weight_scale", "weight_scale_inv", "scale")
LOW_RANK = ("weight_quantizer._svdquant_lora_a", "weight_quantizer._svdquant_lora_b")
OF_A_CACHE = ("k_scale", "v_scale")
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
BLOCK = 128  # the side of a square block of FP8


def tensors_of(folder: Path) -> Tensors:
    """Every tensor of a checkpoint, named as the files name it."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def codes_of(tensors: Tensors) -> dict[str, Tensor]:
    """The packed codes of each linear by its path in the files, or its weight in FP8."""
    found = {}
    for name, tensor in unstacked(tensors).items():
        path, _, leaf = name.rpartition(".")
        if leaf in PACKED and tensor.dtype in QUANTISED:
            found[path] = tensor
    return found


def exact(tensors: Tensors, path: str) -> Tensor:
    """The weight of a quantised linear in float64, with the global scale in float32 as a factor."""
    tensors = unstacked(tensors)
    codes = next(t for leaf in PACKED if (t := tensors.get(f"{path}.{leaf}")) is not None)
    scale = real(next(t for leaf in SCALES if (t := tensors.get(f"{path}.{leaf}")) is not None))
    if codes.dtype == torch.float8_e4m3fn:
        return codes.double() * spread(scale, codes.shape)
    factor = tensors.get(f"{path}.weight_scale_2", torch.ones(()))
    if (divisor := tensors.get(f"{path}.weight_global_scale")) is not None:
        factor = 1 / divisor
    values = elements(codes)
    return values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1) * factor.double()


def elements(codes: Tensor) -> Tensor:
    """E2M1 from bytes: the low four bits are the even column."""
    codes = codes.view(torch.uint8)
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()
    return torch.cat([E2M1, -E2M1])[both]


def real(scale: Tensor) -> Tensor:
    """Scales as float64: E8M0 where they are bytes."""
    return (scale.double() - 127).exp2() if scale.dtype == torch.uint8 else scale.double()


def spread(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The scale of each element: of the whole, of each row, or of each square block."""
    rows, columns = shape
    if scale.numel() in (1, rows):
        return scale.reshape(-1, 1)
    return scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def pre_quant_scale(tensors: Tensors, path: str) -> Tensor | None:
    """What multiplies the input of a linear (AWQ)."""
    return tensors.get(f"{path}.pre_quant_scale")


def low_rank(tensors: Tensors, path: str) -> tuple[Tensor, ...]:
    """Matrices whose product is added to the weight (SVDQuant), or none."""
    return tuple(tensors[name] for leaf in LOW_RANK if (name := f"{path}.{leaf}") in tensors)


def dense(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint with dense weights, each rounded once to ``dtype``.

    Inputs are scaled as AWQ says, and quantised where transformers runs FP8 layers of compressed-tensors; the low-rank
    part of SVDQuant is added to the product, as ModelOpt's own code does it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tensors, config = tensors_of(folder), AutoConfig.from_pretrained(folder)
    quantised, producer = codes_of(tensors), config.quantization_config
    del config.quantization_config
    config.tie_word_embeddings &= "lm_head" not in quantised
    model = as_loaded(AutoModelForCausalLM.from_config(config, dtype=dtype), dtype).eval()
    lacking, surplus = model.load_state_dict(state_of(tensors, config.model_type, dtype), strict=False)
    assert not surplus and lacking == (["lm_head.weight"] if config.tie_word_embeddings else [])
    for path, codes in quantised.items():
        if pre_quant_scale(tensors, path) is not None:
            before(model, path, partial(scaled, by=pre_quant_scale(tensors, path)))
        if pair := low_rank(tensors, path):
            model.get_submodule(path).register_forward_hook(partial(with_low_rank, pair=pair))
        if codes.dtype == torch.float8_e4m3fn and producer["quant_method"] == "compressed-tensors":
            before(model, path, partial(quantised_input, tensors=tensors, path=path, config=producer))
    return model


def state_of(tensors: Tensors, model_type: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of the dense model, its quantised weights rounded once."""
    quantised = codes_of(tensors)
    weights = {renamed(path, model_type): exact(tensors, path) for path in quantised}
    state = {renamed(name, model_type): t for name, t in unstacked(tensors).items() if plain(name, quantised)}
    state |= {f"{path}.weight": rounded(w, dtype) for path, w in weights.items() if not is_expert(path)}
    experts = {path: weight for path, weight in weights.items() if is_expert(path)}
    return state | {name: rounded(w, dtype) for name, w in fused(experts, model_type).items()}


def split(name: str) -> tuple[str, str]:
    """The path of a linear and the rest of the name of one of its tensors; that of SVDQuant has a dot."""
    leaf = next((leaf for leaf in LOW_RANK if name.endswith(f".{leaf}")), name.rpartition(".")[2])
    return name.removesuffix(leaf).removesuffix("."), leaf


def plain(name: str, quantised: dict[str, Tensor]) -> bool:
    """Whether a tensor of the files is one of the dense model."""
    path, leaf = split(name)
    return leaf not in OF_A_CACHE and (path not in quantised or leaf == "bias")


def before(model: nn.Module, path: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the input of a module."""
    model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),))


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """In the dtype of the input."""
    return (x * by).to(x.dtype)


def with_low_rank(_: nn.Module | None, inputs: tuple[Tensor], out: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    """As SVDQuantLinear of ModelOpt has it."""
    a, b = (matrix.to(out.dtype) for matrix in pair)
    return out + linear(linear(inputs[0], a), b)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float64 once, to nearest even, by asking which of three neighbours is nearest."""
    near = exact.to(dtype)
    if dtype in (torch.float32, torch.float64):
        return near
    bits = near.view(torch.int16)
    choices = torch.stack([near, (bits - 1).view(dtype), (bits + 1).view(dtype)])
    wrong, odd = (choices.double() - exact).abs().nan_to_num(torch.inf), (choices.view(torch.int16) & 1).double()
    best = torch.where(wrong == wrong.amin(0), odd, 2).argmin(0, keepdim=True)
    return torch.where(near == 0, near, choices.gather(0, best)[0])


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative L2 error."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
