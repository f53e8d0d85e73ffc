"""Models of diffusers from single files in NVFP4, of ComfyUI and of Black Forest Labs, with their weights packed.

>>> from marlin_w4a16.diffusers import from_single_file
>>> transformer = from_single_file(Flux2Transformer2DModel, "flux2-dev-nvfp4.safetensors", torch_dtype=torch.bfloat16)

Names and splits are diffusers' own: its converter of the class is run on numbers of rows in place of the FP4 weights,
and where those land is read off. What it makes of a weight beyond an order of rows is dense.
"""

import logging
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from marlin_w4a16.checkpoints.comfy import BESIDE, Stored, stored
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.packed_linear import PackedLinear

log = logging.getLogger("marlin_w4a16")


class Method(str, Enum):
    """As diffusers has one for each quantizer."""

    MARLIN = "marlin_w4a16"


class FP4FileConfig(QuantizationConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """What a single file holds in FP4 and FP8.

    Args:
        layers: by path, see `stored`.
        compute_dtype: of the activations.
    """

    def __init__(self, layers: dict[str, Stored], compute_dtype: torch.dtype = torch.bfloat16) -> None:
        self.quant_method, self.layers, self.compute_dtype = Method.MARLIN, layers, compute_dtype


def from_single_file(cls: Any, path: str | Path, **options: Any) -> Any:
    """The model of a single file, its FP4 linears packed (`PackedLinear`), FP8 decoded, all else as diffusers does it.

    Args:
        cls: of diffusers, with ``from_single_file``.
        path: of a safetensors file on this machine.
        options: those of ``cls.from_single_file``, such as ``torch_dtype`` (bfloat16 if there is none) and ``config``.

    Raises:
        CheckpointError: nothing in the file is FP4, or some of it is malformed or in a format that is not read here.
    """
    layers = stored(Path(path))
    if not any(layer.format == "nvfp4" for layer in layers.values()):
        raise CheckpointError(f"{path}: found no FP4, expected weights of ComfyUI or Black Forest Labs in NVFP4")
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None) or torch.bfloat16
    config = FP4FileConfig(layers, dtype)
    return cls.from_single_file(str(path), torch_dtype=dtype, quantization_config=config, **options)


class _Rows(Tensor):
    """Stands for an FP4 weight while diffusers splits and joins weights: of each row its number, in all columns."""


class FP4FileQuantizer(DiffusersQuantizer):  # type: ignore[misc]  # diffusers has no types
    """Packs what `FP4FileConfig` says; hooks as in diffusers 0.42."""

    use_keep_in_fp32_modules = False

    def __init__(self, quantization_config: FP4FileConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._weights: list[FP4Weight] = []
        self._starts: list[int] = [0]
        self._landed: dict[str, tuple[Tensor, torch.device]] = {}

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """That of the config, if there is none."""
        dtype: torch.dtype = torch_dtype or self.quantization_config.compute_dtype
        return dtype

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Numbers of rows in place of FP4, values in place of FP8; what stands beside them is taken out."""
        for path, layer in self.quantization_config.layers.items():
            names = {leaf: f"{path}.{leaf}" for leaf in ("weight", *BESIDE)}
            held = {leaf: state_dict.pop(name) for leaf, name in names.items() if name in state_dict}
            if layer.format == "nvfp4":
                self._weights.append(layer.fp4(held))
                start = self._starts[-1]
                self._starts.append(start + layer.n)
                rows = torch.arange(start, start + layer.n)[:, None].expand(-1, layer.k)
                state_dict[names["weight"]] = rows.as_subclass(_Rows)
            else:
                state_dict[names["weight"]] = layer.dense(held).to(self.quantization_config.compute_dtype)
        return state_dict

    def check_if_quantized_param(self, model: Any, param_value: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether it stands for FP4."""
        return isinstance(param_value, _Rows)

    def check_quantized_param_shape(self, name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """ComfyUI pads rows to 16.

        Raises:
            CheckpointError: the sizes are others.
        """
        wanted, found = tuple(current_param.shape), tuple(loaded_param.shape)
        if len(wanted) == 2 and found == (-(-wanted[0] // 16) * 16, wanted[1]):
            return True
        raise CheckpointError(f"{name}: found FP4 of {list(found)}, expected {list(wanted)}, as the model has")

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Remembers which rows a weight is; they are packed once its bias is there."""
        self._landed[param_name] = param_value.as_subclass(Tensor)[:, 0].contiguous(), torch.device(target_device)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        dtype, packed = self.quantization_config.compute_dtype, 0
        for name, (rows, device) in self._landed.items():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            weight = self._rows(rows[: module._parameters[leaf].shape[0]], device)
            if type(module) is nn.Linear and leaf == "weight":
                parent, _, last = path.rpartition(".")
                made = PackedLinear(weight, module.bias, dtype).train(module.training)
                model.get_submodule(parent)._modules[last] = made
                packed += 1
            else:
                module._parameters[leaf] = nn.Parameter(weight.decode(torch.float64).to(dtype), requires_grad=False)
        self._weights.clear()
        self._landed.clear()
        log.info("loaded %s: %d linears packed", type(model).__name__, packed)
        return model

    def _rows(self, rows: Tensor, device: torch.device) -> FP4Weight:
        """Rows of all FP4 weights, by their numbers, as one weight."""
        parts = list(self._parts(rows))
        tensors = [torch.cat(some).to(device) for some in zip(*parts, strict=True)]
        return self._weights[0].derived(*tensors)

    def _parts(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        starts = torch.tensor(self._starts)
        which = torch.bucketize(rows, starts, right=True) - 1
        for number, count in zip(
            *(t.tolist() for t in torch.unique_consecutive(which, return_counts=True)), strict=True
        ):
            some, rows = rows[:count] - starts[number], rows[count:]
            weight = self._weights[number]
            yield weight.codes[some], weight.scales[some], weight.multiplier[some]

    @property
    def is_serializable(self) -> bool:
        """diffusers writes no FP4 of this project."""
        return False

    @property
    def is_trainable(self) -> bool:
        """FP4 weights are frozen."""
        return False

    @property
    def is_compileable(self) -> bool:
        """By any backend."""
        return True


auto.AUTO_QUANTIZER_MAPPING[Method.MARLIN.value] = FP4FileQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.MARLIN.value] = FP4FileConfig
