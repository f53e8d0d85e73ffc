"""FP8 linears, which transformers loads beside FP4 experts (DeepSeek-V4), as their checkpoint holds them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.storage import DTYPES
from marlin_w4a16.checkpoints.values import read
from marlin_w4a16.kernels.scale_bytes import e8m0_values, fp8_codes

SCALES = ("scale", "weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True)
class FP8Blocks:
    """The FP8 linears of a checkpoint, which are dense in a model where transformers has no kernels for them.

    Attributes:
        names: the name in the model of each of the checkpoint's tensors that transformers loads.
        scales: of the FP8 weights, by the names of those in the checkpoint: the name of each and its values.
        widened: the dtype in the checkpoint of what transformers may keep in float32.
    """

    names: Mapping[str, str]
    scales: Mapping[str, tuple[str, Tensor]]
    widened: Mapping[str, torch.dtype]

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's tensors, FP8 weights bit for bit, from the state dict of the model.

        Raises:
            CheckpointError: a weight is no FP8 any more.
        """
        found, left = dict[str, Tensor](), dict(state)
        scales = {name for name, _ in self.scales.values()}
        for name, held in self.names.items():
            if name in scales or held not in left:
                continue
            tensor = left.pop(held)
            if name in self.scales:
                scale_name, scale = self.scales[name]
                left.pop(f"{held}_scale_inv", None)
                found[scale_name] = scale
                tensor = tensor if tensor.dtype == torch.float8_e4m3fn else _codes(name, tensor, scale)
            found[name] = _narrowed(tensor, self.widened.get(name, tensor.dtype))
        return {**left, **found}


def fp8_blocks(others: Mapping[str, Entry], names: Mapping[str, str], dtype: torch.dtype) -> FP8Blocks:
    """Finds the FP8 linears among the tensors that transformers loads, given the names they get in a model."""
    pairs: dict[str, str] = {}
    for name, entry in others.items():
        path, _, leaf = name.rpartition(".")
        scale = next((f"{path}.{s}" for s in SCALES if f"{path}.{s}" in others), None)
        if leaf == "weight" and entry.dtype == "F8_E4M3" and scale is not None:
            pairs[name] = scale
    held = read({scale: others[scale] for scale in pairs.values()})
    scales = {name: (scale, held[scale]) for name, scale in pairs.items()}
    stored = {name: DTYPES[entry.dtype] for name, entry in others.items() if entry.dtype in ("BF16", "F16")}
    return FP8Blocks(names, scales, {name: of for name, of in stored.items() if of == dtype})


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a narrower dtype, if it is none the worse for that."""
    if tensor.dtype == dtype:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _codes(name: str, weight: Tensor, scale: Tensor) -> Tensor:
    """The E4M3 codes of a weight that was decoded with a scale for each block."""
    rows, columns = (-(-size // blocks) for size, blocks in zip(weight.shape, scale.shape, strict=True))
    factor = scale.double() if scale.dtype != torch.uint8 else e8m0_values(scale)
    factor = factor.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    factor = factor[: weight.shape[0], : weight.shape[1]].to(weight.device)
    codes = fp8_codes(weight, factor, Tensor.to)
    if codes is None or bool(codes.float().isnan().any()):
        raise CheckpointError(
            f"{name}: found values that are no FP8 codes times their scales in {weight.dtype}, expected those loaded: "
            "load in bfloat16 or float32 to save, or save what dequantize() gives"
        )
    return codes
