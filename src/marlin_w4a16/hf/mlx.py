"""Folders of MLX in transformers, which does not know them: FP4 linears and experts are packed, all else is decoded.

MLX quantises embeddings and routers, too. They are decoded while transformers loads them; their tensors are kept
beside, on the CPU, to be saved as they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.utils.hub import cached_file

from marlin_w4a16.checkpoints import files, mlx
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.values import read
from marlin_w4a16.hf.configs import ModelOptConfig
from marlin_w4a16.hf.linear import CheckpointLinear
from marlin_w4a16.hf.quantizer import OwnQuantizer


class MLXConfig(ModelOptConfig):
    """How a folder of MLX is loaded; see `ModelOptConfig`. ``mlx_config(path)`` makes one."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**{**choices, "quant_method": "mlx"})

    def to_dict(self) -> dict[str, Any]:
        """The folder's config as it was: it names no method."""
        return {name: value for name, value in super().to_dict().items() if name != "quant_method"}


def mlx_config(path: str | Path, **options: Any) -> PreTrainedConfig:
    """The config of the model in a folder of MLX: ``from_pretrained(path, config=mlx_config(path))``.

    Without it transformers raises, since its ``quantization_config`` has no ``quant_method``.

    Args:
        path: a folder or a name on the hub.
        options: ``dequantize``.

    Raises:
        CheckpointError: it is none of MLX, or nothing in it is FP4.
    """
    found = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
    values = files.read_json(Path(found)) if found is not None else {}
    quantization = values.get("quantization") or values.get("quantization_config") or {}
    if not mlx.is_mlx(quantization) or not mlx.is_fp4(quantization):
        told = f"quantization {quantization}" if quantization else "no quantization in config.json"
        raise CheckpointError(f"{path}: found {told}, expected that of MLX with mode mxfp4 or nvfp4")
    config: PreTrainedConfig = AutoConfig.from_pretrained(path)
    config.quantization_config = {**quantization, **options, "quant_method": "mlx"}  # of which transformers makes one
    return config


@dataclass(frozen=True, slots=True)
class Decoded:
    """A matrix that is dense in the model.

    Attributes:
        path: of its tensors in the folder.
        name: of the parameter.
        tensors: as they are stored, by leaf.
        k: its columns.
    """

    path: str
    name: str
    tensors: Mapping[str, Tensor]
    k: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Its values."""
        return mlx.decode(self.tensors, self.k, dtype, self.path)


class MLXQuantizer(OwnQuantizer):
    """Folders of MLX."""

    _decoded: tuple[Decoded, ...] = ()
    _names: Mapping[str, str] = MappingProxyType({})  # in the model of what is no FP4 linear, by those in the folder

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._conversions: list[Any] = []

    @property
    def _shares(self) -> bool:
        return True

    def _before_sharing(self, model: PreTrainedModel, others: Mapping[str, Entry], names: Mapping[str, str]) -> None:
        parameters, found = dict(model.named_parameters()), list[Decoded]()
        for path, entries in mlx.packed(others).items():
            name = names[f"{path}.weight"]
            if name not in parameters or parameters[name].ndim != 2:
                expected = "a matrix of the model, or a linear in mxfp4 or nvfp4"
                raise CheckpointError(f"{path}: found {entries['weight']} with scales, expected {expected}")
            tensors = read({f"{path}.{leaf}": entry for leaf, entry in entries.items()})
            held = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
            found.append(Decoded(path, name, held, parameters[name].shape[1]))
            sources = [names[f"{path}.{leaf}"] for leaf in entries]
            self._conversions.append(WeightConverter(sources, name, [_Decode(self, found[-1])]))
        own = {f"{one.path}.{leaf}" for one in found for leaf in one.tensors}
        self._decoded, self._names = tuple(found), {name: held for name, held in names.items() if name not in own}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, r"\.switch_mlp\."}  # `own_names` has those of the model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        # names are the folder's when it is saved: ".mlp.", a pattern of transformers, is in "switch_mlp.", too
        setattr(model, "_weight_conversions", [])  # noqa: B010
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_weight_conversions(self) -> list[Any]:
        """How transformers loads what is dense in the model and is not in the folder."""
        return self._conversions

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict in the folder's format, bit for bit.

        Raises:
            CheckpointError: a matrix was changed since it was decoded.
        """
        state, metadata = super().get_state_dict_and_metadata(model)
        if state is None or getattr(model, "_hf_peft_config_loaded", False):
            return state, metadata
        for one in self._decoded:
            weight = state[one.name]
            loaded = (one.dense(dtype).to(weight.dtype) for dtype in (self.model_dtype, weight.dtype))  # or kept wide
            if not any(torch.equal(dense, weight.cpu()) for dense in loaded):
                raise CheckpointError(
                    f"{one.name}: found other values than the folder's, expected those: a matrix that was changed can "
                    "be saved after dequantize()"
                )
            # a tied head, too: the same memory
            state = {name: t for name, t in state.items() if name != one.name and t.data_ptr() != weight.data_ptr()}
            state |= {f"{one.path}.{leaf}": tensor for leaf, tensor in one.tensors.items()}
        linears = ((path, module) for path, module in model.named_modules() if isinstance(module, CheckpointLinear))
        theirs = {f"{path}.{leaf}": m.layer.name(leaf) for path, m in linears for leaf in m.layer.entries}
        theirs |= {held: name for name, held in self._names.items()}
        return {theirs.get(name, name): tensor for name, tensor in state.items()}, metadata


class _Decode(ConversionOps):
    """Decodes a matrix while it is loaded, in the dtype of its parameter."""

    def __init__(self, hf_quantizer: MLXQuantizer, one: Decoded) -> None:
        self.hf_quantizer, self.one = hf_quantizer, one

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """The matrix by the name of its parameter."""
        name, device = kwargs["full_layer_name"], next(iter(input_dict.values()))[0].device
        return {name: self.one.dense(kwargs["model"].get_parameter(name).dtype).to(device)}
