"""What a user may choose when a checkpoint is loaded: ``from_pretrained(path, quantization_config=...)``."""

import copy
from pathlib import Path
from typing import Any, get_args

import transformers
from transformers.utils import quantization_config as of_transformers
from transformers.utils.hub import cached_file

from marlin_w4a16.checkpoints import files
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.registry import scheme_of
from marlin_w4a16.passes.settings import ActivationQuant


class ModelOptConfig(of_transformers.Mxfp4Config):
    """How a checkpoint of NVIDIA ModelOpt is loaded, and of others whose ``quant_method`` transformers does not know.

    Args:
        dequantize: load dense weights instead.
        activation_quant: ``"drop"`` leaves out the quantisation of inputs (W4A4), ``"keep"`` runs it, ``"refuse"``
            raises if there is any.
        values: the quantisation config itself, as config.json or hf_quant_config.json has it; needed only where
            config.json has none: ``ModelOptConfig.of(path)`` reads it.
    """

    # A subclass of Mxfp4Config, since transformers takes options over from a fixed tuple of classes only
    # (LOADING_ATTRIBUTES_CONFIG_TYPES in quantizers/auto.py, 5.17 to 5.23).
    def __init__(self, dequantize: bool = False, activation_quant: ActivationQuant = "drop", **values: Any) -> None:
        self.quant_method = values.get("quant_method", "modelopt")
        self.values = {**values, "quant_method": self.quant_method}
        self.given: dict[str, Any] = values  # or the user's, beside that of a checkpoint
        self.dequantize = dequantize
        self.activation_quant = checked(activation_quant)

    @classmethod
    def of(cls, path: str, **options: Any) -> "ModelOptConfig":
        """The config of a checkpoint that has a hf_quant_config.json only, as older exports of ModelOpt have.

        Args:
            path: a folder or a name on the hub.
            options: ``dequantize``, ``activation_quant``.

        Raises:
            CheckpointError: there is no such file, or it is no JSON object.
        """
        found = cached_file(path, "hf_quant_config.json", _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise CheckpointError(f"{path}: found no hf_quant_config.json, expected one")
        return cls(**options, **{**files.read_json(Path(found)), "quant_method": "modelopt"})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What goes over a checkpoint's own config."""
        return {"dequantize": self.dequantize, "activation_quant": self.activation_quant, "given": self.values}

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's config as it was; what the user gave where there is none."""
        return copy.deepcopy(self.values if len(self.values) > 1 else self.given)


class _AsStored:
    """A config of transformers that is saved as it stood in config.json."""

    values: dict[str, Any] | None = None
    given: dict[str, Any] | None = None  # as it was read, also where it is not kept

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The config, checked before transformers reads it; see `scheme_of` for errors."""
        scheme = scheme_of(config_dict.get("quantization_config", config_dict), {})
        otherwise: Any = super()
        try:
            made = otherwise.from_dict(config_dict, *args, **kwargs)
        except ImportError:
            raise
        except Exception as error:  # whatever the producer's code raises of a config
            if scheme is None:
                raise
            raise CheckpointError(f"{scheme.where}: found one that {cls.__name__} does not take: {error}") from error
        config = made[0] if isinstance(made, tuple) else made
        config.given = config_dict.get("quantization_config", config_dict)
        return made

    @classmethod
    def like(cls, other: Any, values: dict[str, Any]) -> Any:
        """The config that transformers read, and what stood in config.json."""
        config = cls()
        vars(config).update(vars(other))
        config.values = values
        return config

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's config as it was."""
        otherwise: Any = super()
        found: dict[str, Any] = copy.deepcopy(self.values) if self.values else otherwise.to_dict()
        return found


# transformers compares the names of classes, so these are called as those they extend.
class CompressedTensorsConfig(_AsStored, transformers.CompressedTensorsConfig):
    """``transformers.CompressedTensorsConfig`` with ``activation_quant``, see `ModelOptConfig`."""

    def __init__(self, *args: Any, activation_quant: ActivationQuant = "drop", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation_quant = checked(activation_quant)

    def get_loading_attributes(self) -> dict[str, Any]:
        """What goes over a checkpoint's own config."""
        inherited: dict[str, Any] = super().get_loading_attributes()
        return {**inherited, "activation_quant": self.activation_quant}


class Mxfp4Config(_AsStored, of_transformers.Mxfp4Config):
    """``transformers.Mxfp4Config``, of gpt-oss."""


class FineGrainedFP8Config(_AsStored, transformers.FineGrainedFP8Config):
    """``transformers.FineGrainedFP8Config``, of DeepSeek-V4."""


def checked(activation_quant: Any) -> ActivationQuant:
    """The policy.

    Raises:
        ValueError: there is none of that name.
    """
    if activation_quant not in get_args(ActivationQuant):
        known = ", ".join(map(repr, get_args(ActivationQuant)))
        raise ValueError(f"activation_quant: found {activation_quant!r}, expected one of {known}")
    return activation_quant  # type: ignore[no-any-return]
