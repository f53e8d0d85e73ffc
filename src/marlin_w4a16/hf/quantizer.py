"""The quantizers that transformers asks to load FP4 checkpoints, by producer; hooks as in transformers 5.17 to 5.23."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.import_utils import is_kernels_available

from marlin_w4a16.checkpoints import compressed_tensors, files
from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.names import Names
from marlin_w4a16.checkpoints.registry import scheme_of
from marlin_w4a16.hf.configs import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from marlin_w4a16.hf.dense import plain_linear
from marlin_w4a16.hf.experts.modules import StoredExperts
from marlin_w4a16.hf.fp8_blocks import FP8Blocks, fp8_blocks
from marlin_w4a16.hf.loading import FP4Loading
from marlin_w4a16.hf.placing import put
from marlin_w4a16.kernels.target import Target

log = logging.getLogger("marlin_w4a16")


class OwnQuantizer(FP4Loading):
    """Checkpoints of formats that transformers does not know, such as those of NVIDIA ModelOpt."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # also where config.json does not say so: see ModelOptConfig.of
        values = quantization_config.to_dict()
        where = files.HF_QUANT_CONFIG if "quantization" in values else "config.json"  # which nests it
        self.scheme = scheme_of(values, {}, where=where)
        if self.scheme is None:
            raise CheckpointError(f"{where}: quantization_config: found no layer in FP4, expected one")


class CompressedTensorsQuantizer(FP4Loading, CompressedTensorsHfQuantizer):
    """Checkpoints of compressed-tensors: FP4 groups are loaded here, all others by transformers' own quantizer."""

    _config = CompressedTensorsConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        config, given = quantization_config.quantization_config, getattr(quantization_config, "given", None)
        values = given or (config.model_dump() if config is not None else {})
        self.scheme = scheme_of({**values, "quant_method": "compressed-tensors"}, {})
        if self.scheme is None or config is None:
            return
        mine = compressed_tensors.fp4_groups(Fields(values, "quantization_config"))
        rest = copy.deepcopy(config)
        rest.config_groups = {name: group for name, group in config.config_groups.items() if name not in mine}
        self.compressor.quantization_config = rest

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict; layers of compressed-tensors are compressed again, since their first forward undid that."""
        state, metadata = super().get_state_dict_and_metadata(model)
        if self.scheme is not None and state is not None:
            for path, module in model.named_modules():
                if getattr(module, "quantization_status", None) == "decompressed":
                    state = {name: t for name, t in state.items() if name.rpartition(".")[0] != path}
                    state |= {f"{path}.{leaf}": tensor for leaf, tensor in _compressed(module, path).items()}
        return state, metadata

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        if self.scheme is not None:
            from compressed_tensors.compressors.base import decompress_module

            for path, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and hasattr(module, "quantization_status"):
                    if module.quantization_status != "decompressed":
                        decompress_module(module)
                    put(model, path, plain_linear(module.weight.detach(), module.bias).train(module.training))
            self.compressor.remove_decompression_hook(model)
        return super()._dequantize(model, dtype)

    def _before_sharing(self, model: PreTrainedModel, others: Mapping[str, Entry], names: Mapping[str, str]) -> None:
        """compressed-tensors gets names in place of patterns, which are matched here in bounded time."""
        rest, paths = self.compressor.quantization_config, [path for path, _ in model.named_modules()]
        rest.ignore = matched(rest.ignore or (), paths)
        for group in rest.config_groups.values():
            group.targets = matched(group.targets, paths)

    @property
    def _shares(self) -> bool:
        """Whether some groups are not FP4."""
        rest = self.compressor.quantization_config
        return rest is not None and bool(rest.config_groups)


class Mxfp4Quantizer(FP4Loading, Mxfp4HfQuantizer):  # type: ignore[misc]  # it names one keyword
    """Checkpoints of gpt-oss; a model that is to be quantised while it is loaded is left to transformers' own class."""

    _config = Mxfp4Config

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized and not left_to_transformers():
            self.scheme = scheme_of(quantization_config.to_dict(), {})

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed that transformers' own class needs."""
        if self.scheme is None:
            super().validate_environment(*args, **kwargs)


class FP8Quantizer(FP4Loading, FineGrainedFP8HfQuantizer):
    """Checkpoints of DeepSeek-V4: experts are loaded here, FP8 linears by transformers' own class.

    That decodes them where it has no kernels; they are FP8 again, bit for bit, when they are saved.
    """

    _config = FineGrainedFP8Config
    _asked_dense = False
    _fp8: FP8Blocks | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Remembers what the user asked for: transformers' own class switches ``dequantize`` on where it must."""
        self._asked_dense = self.quantization_config.dequantize
        super().validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        shards = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        found = files.quantization_of(shards[0].parent) if shards else None
        says = found[1] if found is not None else {}  # transformers 5.17 drops what it does not know
        if self.pre_quantized and not left_to_transformers():
            self.scheme = scheme_of({**says, "quant_method": "fp8"}, vars(model.config))
        if self.scheme is not None:
            vars(model.config).pop("base_model_ep_plan", None)  # 5.17 writes FP8 experts into it, and would save that
            if not self.quantization_config.dequantize and not is_kernels_available():
                log.warning("FP8 linears are decoded to %s: their kernels need `pip install kernels`", self.model_dtype)
                self.quantization_config.dequantize = True
        super()._process_model_before_weight_loading(model, **kwargs)

    def _before_sharing(self, model: PreTrainedModel, others: Mapping[str, Entry], names: Mapping[str, str]) -> None:
        config, self._fp8 = self.quantization_config, fp8_blocks(others, names, self.model_dtype)
        dense = config.modules_to_not_convert
        dense = self.get_modules_to_not_convert(model) if dense is None else dense  # a list takes their place
        named = Names(dense, "transformers", "quantization_config.modules_to_not_convert")
        paths = dict(model.named_modules())
        config.modules_to_not_convert = [
            f"{re.escape(path)}$" for path, m in paths.items() if isinstance(m, StoredExperts) or named.find(path)
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        if self.scheme is not None:
            setattr(model, "_weight_conversions", [])  # noqa: B010, names are the checkpoint's when it is saved
        return super()._process_model_after_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict in the checkpoint's format, bit for bit, FP8 linears too."""
        state, metadata = super().get_state_dict_and_metadata(model)
        if self._fp8 is not None and state is not None and not getattr(model, "_hf_peft_config_loaded", False):
            state = self._fp8.stored(state)
        return state, metadata

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """A model whose experts are FP4 is a quantised one, also where its FP8 linears were decoded."""
        if self.scheme is not None:
            self.quantization_config.dequantize = self._asked_dense
        return super().postprocess_model(model, **kwargs)

    @property
    def _dequantizes(self) -> bool:
        return self._asked_dense

    @property
    def _shares(self) -> bool:
        return True


def left_to_transformers() -> bool:
    """Whether formats that transformers has kernels for are left to it: on GPUs that this project leaves."""
    return torch.cuda.is_available() and not Target.of(torch.device("cuda")).supported


def matched(patterns: Iterable[str], paths: Iterable[str]) -> list[str]:
    """Names in place of regular expressions."""
    names = Names((p for p in patterns if p.startswith("re:")), "re", "quantization_config")
    return [*(p for p in patterns if not p.startswith("re:")), *(path for path in paths if names.find(path))]


def _compressed(module: Any, path: str) -> dict[str, Tensor]:
    """The tensors of a layer that compressed-tensors decompressed, as it stores them."""
    from compressed_tensors.compressors import BaseCompressor

    scheme = module.quantization_scheme
    held = {leaf: tensor.detach() for leaf, tensor in module.named_parameters(recurse=False)}
    held |= dict(module.named_buffers(recurse=False))
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    found: dict[str, Tensor] = compressor.compress(held, scheme)
    if not torch.equal(compressor.decompress(found, scheme)["weight"], held["weight"]):
        raise CheckpointError(
            f"{path}.weight: found values that {scheme.format.value} and the scales in {held['weight'].dtype} cannot "
            "hold, expected those loaded: save before the first forward, or load in bfloat16"
        )
    return found
