"""What the quantizers share that transformers asks to load FP4 checkpoints; hooks as in transformers 5.17 to 5.24."""

import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from marlin_w4a16.checkpoints import files
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.layers import Contents, contents
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.values import bad_values, read
from marlin_w4a16.hf.ahead import Ahead, load_kernels, one_device
from marlin_w4a16.hf.configs import checked
from marlin_w4a16.hf.experts.load import Loader, bytes_beside, own_names
from marlin_w4a16.hf.experts.modules import CheckpointExperts, StoredExperts
from marlin_w4a16.hf.generation import compile_decode
from marlin_w4a16.hf.joined import CheckpointParts, FP8Parts, StoredParts
from marlin_w4a16.hf.linear import CheckpointLinear, DecodedLinear, FP8Linear, Nested, StoredLinear
from marlin_w4a16.hf.loaded import Loaded, loaded
from marlin_w4a16.hf.placing import place, put, swap_in
from marlin_w4a16.hf.renaming import keep_names
from marlin_w4a16.hf.resizing import allow_resizing, refuse_resizing
from marlin_w4a16.hf.scaled import ScaledParameters
from marlin_w4a16.report.problems import told
from marlin_w4a16.report.progress import track

_LINEARS = CheckpointLinear | FP8Linear | DecodedLinear
_READ = StoredExperts | StoredParts  # not by transformers
log = logging.getLogger("marlin_w4a16")


class FP4Loading(HfQuantizer):
    """What the quantizers share: layers are stored ones while weights are loaded, and are packed one by one after it.

    A subclass says by `scheme` what the checkpoint holds; None leaves everything to its base class.
    """

    _config: type[Any] | None = None  # that of the checkpoint, which saves itself as it was
    scheme: Scheme | None = None
    model_dtype: torch.dtype = torch.bfloat16
    report: Loaded | None = None
    cache_scales: Mapping[str, Tensor] = MappingProxyType({})
    _files_names: tuple[str, ...] = ()
    _ahead: Ahead | None = None
    _scaled: ScaledParameters = ScaledParameters(())
    _beside: Mapping[str, int] = MappingProxyType({})

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Remembers the dtype of the model: no other hook is told."""
        self.model_dtype = super().update_dtype(dtype)
        return self.model_dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.scheme is None:
            super()._process_model_before_weight_loading(model, **kwargs)
            return
        name = str(model.config.name_or_path)
        if getattr(model.config, "distributed_config", None) is not None:
            raise CheckpointError(f"{name}: found a distributed_config, expected none: FP4 layers are not sharded yet")
        checkpoint_files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not checkpoint_files:
            raise CheckpointError(f"{name}: found a state dict, expected a checkpoint's files: its headers are read")
        self._keep_config(checkpoint_files[0].parent)
        held = self._contents(name, checkpoint_files, model)
        placement = place(held, model, self.scheme)
        policy = checked(getattr(self.quantization_config, "activation_quant", "drop"))
        problems, device = held.problems + placement.problems, one_device(kwargs.get("device_map"))
        loads = None if problems else load_kernels(placement.layers.values(), device, self.model_dtype)
        problems = problems or tuple(bad_values(placement.every, policy == "keep"))
        if problems:
            raise CheckpointError(told(name, problems))
        self.report = loaded(self.scheme, placement, policy, self._dequantizes, held.notes)
        self.cache_scales = read(placement.cache_scales)
        dense = self.model_dtype.itemsize if self._dequantizes else None
        self._beside = bytes_beside(model, placement.mixtures, dense)
        self._scaled = ScaledParameters(placement.scaled)
        own = [*(mixture.path for mixture in placement.mixtures), *placement.joined, *placement.elsewhere]
        own += placement.layers if device is not None else []
        scales = (re.escape(one.scale[1]) for one in placement.scaled)
        not_loaded = (*map(re.escape, self.cache_scales), *scales, *own_names(model, own))
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *not_loaded}
        swap_in(model, placement, self.model_dtype, policy == "keep", device is not None)
        if device is not None:
            self._ahead = Ahead(model, placement.layers, device, loads)
        if self._shares:
            self._before_sharing(model, held.others, placement.others)
            super()._process_model_before_weight_loading(model, **kwargs)

    def _contents(self, name: str, checkpoint_files: list[Path], model: PreTrainedModel) -> Contents:
        """What the files hold."""
        entries = _entries(name, checkpoint_files)
        self._files_names = tuple(entries)
        return contents(entries, cast(Scheme, self.scheme))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.scheme is None:
            return super()._process_model_after_weight_loading(model, **kwargs)
        start = time.perf_counter()
        keep_names(model, self._files_names)
        _to_dtype(model, self.model_dtype)
        self._scaled.multiply(model)
        dense = self.model_dtype if self._dequantizes else None
        paths = [path for path, module in model.named_modules() if isinstance(module, StoredLinear | _READ)]
        with Loader(model) as loader:
            for path in track(paths, "Packing weights"):
                stored: Any = model.get_submodule(path)
                if isinstance(stored, _READ):
                    loader.settle(path, dense)
                    continue
                if self._ahead is not None:
                    stored.take(self._ahead.take(path))
                _settle(model, path, dense)
        self._ahead = None
        if not self._dequantizes:
            compile_decode(model)
            refuse_resizing(model)
        if self.report is not None:
            self.report.log(log, time.perf_counter() - start)
        return super()._process_model_after_weight_loading(model, **kwargs) if self._shares else model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """Layers are loaded under the names of the checkpoint; 5.17 does not hand over the model."""
        if self.scheme is not None and not self._shares:
            return weight_conversions
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return conversions

    @property
    def _shares(self) -> bool:
        """Whether the base class loads some layers."""
        return False

    def _before_sharing(self, model: PreTrainedModel, others: Mapping[str, Entry], names: Mapping[str, str]) -> None:
        """Tells the base class what it is not to load, and remembers what it loads: see `FP8Blocks`."""

    def _keep_config(self, folder: Path) -> None:
        """Keeps the quantisation config as it stands in the checkpoint, to save it so."""
        found = files.quantization_of(folder) if self._config is not None else None
        if self._config is not None and found is not None and found[0] == "config.json":
            self.quantization_config = self._config.like(self.quantization_config, found[1])

    @property
    def _dequantizes(self) -> bool:
        return bool(getattr(self.quantization_config, "dequantize", False))

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if self.scheme is None:
            dequantized: PreTrainedModel = super()._dequantize(model, dtype)
            return dequantized
        # save_pretrained makes a name of the dtype in the config, which is what transformers passes on
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype or self.model_dtype
        before = model.dtype
        allow_resizing(model)
        for path, module in model.named_modules():
            if isinstance(module, StoredLinear) and any(parameter.is_meta for parameter in module.parameters()):
                raise _offloaded(path)
        for path, module in list(model.named_modules()):
            if isinstance(module, _LINEARS | StoredLinear | CheckpointExperts | CheckpointParts | FP8Parts):
                put(model, path, module.dense(chosen).train(module.training))
        for parameter in model.parameters():
            if parameter.dtype == before:
                parameter.data = parameter.data.to(chosen)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict in the checkpoint's format, bit for bit; a `StoredLinear`, offloaded, holds it already."""
        if self.scheme is None or getattr(model, "_hf_peft_config_loaded", False):
            state, metadata = super().get_state_dict_and_metadata(model)
            return state, metadata
        state = dict(model.state_dict())
        for path, module in model.named_modules():
            if isinstance(module, _LINEARS):
                prefix = f"{path}."
                state = {k: v for k, v in state.items() if not k.startswith(prefix) or k == f"{prefix}bias"}
                state |= {f"{prefix}{leaf}": tensor for leaf, tensor in module.stored().items()}
            elif isinstance(module, CheckpointExperts):
                state = {k: v for k, v in state.items() if not k.startswith(f"{path}.")}
                state |= {f"{path}.{name}": bias for name, bias in module.biases().items()}
                # under the checkpoint's own names, which no renaming of transformers knows how to change back
                state |= dict(module.stored())
            elif isinstance(module, CheckpointParts | FP8Parts):
                state = {k: v for k, v in state.items() if not k.startswith(f"{path}.") or k == f"{path}.bias"}
                state |= dict(module.stored())
        return {**self._scaled.stored(state), **self.cache_scales}, {}

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of an element, once dense for a layer that will be dequantised."""
        path, _, leaf = param_name.rpartition(".")
        if self._dequantizes and isinstance(module := model.get_submodule(path), StoredLinear) and leaf != "bias":
            dense = module.in_features * module.out_features * self.model_dtype.itemsize
            return dense / max(1, param.numel()) if leaf == module.layer.storage.leaf("codes") else 0.0
        held: float = super().param_element_size(model, param_name, param)
        return held + self._beside.get(param_name, 0) / max(1, param.numel())

    def is_serializable(self) -> bool:
        """A model is saved in the format it was loaded from."""
        return self.scheme is not None or bool(super().is_serializable())  # type: ignore[safe-super]

    @property
    def is_trainable(self) -> bool:
        """Adapters, biases and dense layers are; FP4 weights are frozen."""
        return self.scheme is not None or bool(super().is_trainable)  # type: ignore[safe-super]

    @property
    def is_compileable(self) -> bool:
        """Decode is compiled by generate()."""
        return self.scheme is not None or bool(super().is_compileable)


def _entries(name: str, checkpoint_files: list[Path]) -> dict[str, files.Entry]:
    """The tensors of a checkpoint, whose files must lie in its folder."""
    folder = Path(name) if Path(name).is_dir() else checkpoint_files[0].parent
    for file in checkpoint_files:
        files.inside(folder, str(file.relative_to(folder) if file.is_relative_to(folder) else file))
    return files.entries(checkpoint_files)


def _to_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts what transformers leaves in the files' dtype: renamed tensors (5.17), all that is beside decoded FP8."""
    for module in model.modules():
        quantised = isinstance(module, StoredLinear | Nested) or hasattr(module, "quantization_scheme")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16) and not (quantised and name != "bias"):
                parameter.data = parameter.data.to(dtype)


def _settle(model: PreTrainedModel, path: str, dense: torch.dtype | None) -> None:
    """Puts what runs in place of a stored layer; one that is offloaded stays as it is, and runs too."""
    stored: Any = model.get_submodule(path)
    hook = getattr(stored, "_hf_hook", None)
    if any(parameter.is_meta for parameter in stored.parameters()):
        if dense is not None:
            raise _offloaded(path)
        return
    module = stored.loaded() if dense is None else stored.dense(dense).train(stored.training)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(module, hook)
    put(model, path, module)


def _offloaded(path: str) -> CheckpointError:
    return CheckpointError(f"{path}: found a layer that is offloaded, expected all on devices to dequantize them")
