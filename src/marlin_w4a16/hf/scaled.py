"""FP8 tensors of a checkpoint that one number multiplies and that are no linears: embeddings (Qwen3.8's n-grams).

transformers loads their codes as the numbers they are, joined where they come in shards; they are multiplied then,
and are codes again when they are saved.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.values import read
from marlin_w4a16.kernels.fp4 import round_once, row_slices
from marlin_w4a16.kernels.scale_bytes import fp8_codes


@dataclass(frozen=True, slots=True)
class Scaled:
    """What is multiplied.

    Attributes:
        parameter: its name in the model.
        scale: the name that its scale has in the checkpoint, and would have in the model.
        entry: the scale.
    """

    parameter: str
    scale: tuple[str, str]
    entry: Entry


class ScaledParameters:
    """All of a model: multiplied, and given back."""

    def __init__(self, scaled: tuple[Scaled, ...]) -> None:
        held = read({one.scale[0]: one.entry for one in scaled})
        self._scales = {one.parameter: (one.scale[1], held[one.scale[0]]) for one in scaled}

    def multiply(self, model: PreTrainedModel) -> None:
        """Makes numbers of the codes, each rounded once to the dtype of its parameter."""
        for name, (_, scale) in self._scales.items():
            data, factor = model.get_parameter(name).data, float(scale.double())
            for rows in row_slices(*data.shape):
                data[rows] = round_once(data[rows].double() * factor, data.dtype)

    def stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with codes and scales in place of the numbers.

        Raises:
            CheckpointError: a number is no code times the scale any more.
        """
        found = dict(state)
        for name, (scale_name, scale) in self._scales.items():
            weight, factor = found[name], scale.double().reshape(())
            codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
            for rows in row_slices(*weight.shape):
                part = fp8_codes(weight[rows].cpu(), factor, round_once)
                if part is None:
                    raise CheckpointError(f"{name}: found values that are no FP8 codes times {scale_name}")
                codes[rows] = part
            found |= {name: codes, scale_name: scale}
        return found
