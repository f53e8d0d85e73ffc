"""Producers whose checkpoints transformers hands to their own packages: FP4 is loaded here, all else by those."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_auto_round import AutoRoundQuantizer as OfAutoRound
from transformers.quantizers.quantizer_fp_quant import FPQuantHfQuantizer
from transformers.quantizers.quantizer_quark import QuarkHfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils import import_utils
from transformers.utils import quantization_config as of_transformers

from marlin_w4a16.checkpoints import auto_round, torchao
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.registry import scheme_of
from marlin_w4a16.checkpoints.scheme import Mismatch
from marlin_w4a16.hf.configs import ModelOptConfig
from marlin_w4a16.hf.quantizer import OwnQuantizer, left_to_transformers


class ProducerConfig(ModelOptConfig):
    """How a checkpoint is loaded whose ``quant_method`` transformers knows; see `ModelOptConfig`.

    Its class is that of transformers where nothing is FP4; if the producer's package is installed, also where something
    is stored that only it reads, and on GPUs with FP4 tensor cores.
    """

    theirs: ClassVar[type[Any]]
    installed: ClassVar[Callable[[], bool]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The config that stands in config.json."""
        scheme = scheme_of(config_dict, {})
        refused = scheme is not None and any(isinstance(stored, Mismatch) for stored in scheme.targets.values())
        if scheme is None or ((refused or left_to_transformers()) and cls.installed()):
            return cls._of_theirs(config_dict, *args, **kwargs)
        return super().from_dict(config_dict, *args, **kwargs)

    @classmethod
    def _of_theirs(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return cls.theirs.from_dict(config_dict, *args, **kwargs)
        except (ImportError, NotImplementedError, ValueError):
            raise
        except Exception as error:  # an assertion, or whatever comes of a value of another type
            found = f"{type(error).__name__}: {str(error)[:200]}"
            where = "config.json: quantization_config"
            raise CheckpointError(f"{where}: found one that {cls.__name__} does not take: {found}") from error


class ProducerQuantizer(OwnQuantizer):
    """Loads what a `ProducerConfig` says; for a config of transformers it is transformers' own class."""

    theirs: ClassVar[type[HfQuantizer]]

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        """Whose quantizer it is, the config says."""
        if isinstance(quantization_config, ProducerConfig):
            return super().__new__(cls)
        return cls.theirs(quantization_config, **kwargs)


# transformers compares the names of classes, so configs are called as those that they stand for.
class QuarkConfig(ProducerConfig):
    """Of AMD Quark."""

    theirs = of_transformers.QuarkConfig
    installed = staticmethod(import_utils.is_quark_available)


class QuarkQuantizer(ProducerQuantizer):
    """Checkpoints of AMD Quark."""

    theirs = QuarkHfQuantizer


class AutoRoundConfig(ProducerConfig):
    """Of Intel AutoRound, in its own format."""

    theirs = transformers.AutoRoundConfig
    installed = staticmethod(import_utils.is_auto_round_available)


class AutoRoundQuantizer(ProducerQuantizer):
    """Checkpoints of Intel AutoRound.

    A ``transformers.AutoRoundConfig`` of the user goes before the class that is registered, so it is looked at here.
    """

    theirs = OfAutoRound

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        """Whose quantizer it is, the config says."""
        return super().__new__(cls, _own(quantization_config), **kwargs)

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(_own(quantization_config), **kwargs)


def _own(config: Any) -> Any:
    """The config of a checkpoint that holds FP4 as one that is loaded here."""
    if isinstance(config, ProducerConfig):
        return config
    values = {**config.to_dict(), "quant_method": "auto-round"}
    return AutoRoundConfig.from_dict(values) if scheme_of(values, {}) is not None else config


class FPQuantConfig(ProducerConfig):
    """Of FP-Quant."""

    theirs = transformers.FPQuantConfig
    installed = staticmethod(import_utils.is_fp_quant_available)


class FPQuantQuantizer(ProducerQuantizer):
    """Checkpoints of FP-Quant."""

    theirs = FPQuantHfQuantizer


class OfCompressedTensors:
    """Makes transformers' config of compressed-tensors, whose package has no words for NVFP4_E5M3 of AutoRound."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The config that stands in config.json.

        Raises:
            CheckpointError: it is of that format.
        """
        if auto_round.e5m3(config_dict) is not None:
            raise CheckpointError(f"found {auto_round.E5M3.found}, expected {auto_round.E5M3.expected}")
        return transformers.CompressedTensorsConfig.from_dict(config_dict, *args, **kwargs)


class TorchAoConfig(ProducerConfig):
    """Of torchao."""

    theirs = transformers.TorchAoConfig
    installed = staticmethod(import_utils.is_torchao_available)


class TorchAoQuantizer(ProducerQuantizer):
    """Checkpoints of torchao, whose headers say how each weight lies; they say so again when it is saved."""

    theirs = TorchAoHfQuantizer
    _said: Mapping[str, str] = MappingProxyType({})

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        shards = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if all(file.suffix == ".safetensors" for file in shards):  # of others the base class tells what they are
            self.scheme = scheme_of(self.quantization_config.to_dict(), {}, shards)
            self._said = torchao.metadata(shards)
        super()._process_model_before_weight_loading(model, **kwargs)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict in the checkpoint's format, bit for bit, and what its headers say."""
        state, metadata = super().get_state_dict_and_metadata(model)
        return state, {**metadata, **self._said}
