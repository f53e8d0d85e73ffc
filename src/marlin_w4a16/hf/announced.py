"""Checkpoints whose config.json does not say how they are quantised: another file of the folder does.

transformers (5.17 to 5.23 were read) asks no quantizer about a checkpoint without a ``quantization_config``, and would
load bytes as if they were weights. So its configs are read through here: `PreTrainedConfig.get_config_dict` is wrapped.
"""

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from marlin_w4a16.checkpoints import files, mlx
from marlin_w4a16.checkpoints.files import HF_QUANT_CONFIG, CheckpointError
from marlin_w4a16.hf import gguf_config

_MAY_BE_MISSING = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
_OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def announce(config: dict[str, Any], path: str, **of_the_hub: Any) -> None:
    """Completes a config that was read from a path: its quantisation config is a well-formed one, and is found.

    Raises:
        CheckpointError: it is no object that names a ``quant_method``.
    """
    text = config.get("text_config")
    held = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    held = held or config.get("quantization")  # of MLX, which names no method
    if isinstance(held, dict) and mlx.is_mlx(held) and mlx.is_fp4(held):
        held = config["quantization_config"] = {**held, "quant_method": "mlx"}
    if held is None and "model_type" in config:
        found = cached_file(path, HF_QUANT_CONFIG, **_MAY_BE_MISSING, **of_the_hub)
        if found is not None:
            held = config["quantization_config"] = {**files.read_json(Path(found)), "quant_method": "modelopt"}
    if held is None:
        return
    where = f"{path}: config.json: quantization_config"
    if not isinstance(held, dict):
        raise CheckpointError(f"{where}: found {type(held).__name__}, expected an object")
    method = held.get("quant_method")
    if not isinstance(method, str) and not (held.get("load_in_8bit") or held.get("load_in_4bit")):
        raise CheckpointError(f"{where}.quant_method: found {method!r}, expected a name such as 'modelopt'")
    config.setdefault("name_or_path", path)  # the quantizers are told of the config alone, and look at its folder


def wrap() -> None:
    """Reads every config of transformers through `announce`; a second call changes nothing."""
    read = PreTrainedConfig.get_config_dict.__func__  # type: ignore[attr-defined]
    if getattr(read, "announces", False):
        return

    @functools.wraps(read)
    def get_config_dict(cls: type[Any], pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[Any, Any]:
        path = str(pretrained_model_name_or_path)
        of_the_hub = {name: kwargs[name] for name in _OF_THE_HUB if name in kwargs}
        file = gguf_config.located(path, str(kwargs["gguf_file"]), **of_the_hub) if kwargs.get("gguf_file") else None
        if file is not None:
            return gguf_config.read(file, lambda: read(cls, pretrained_model_name_or_path, **kwargs))
        try:
            config, rest = read(cls, pretrained_model_name_or_path, **kwargs)
        except RecursionError as error:
            raise CheckpointError(f"{path}: found a config that is nested too deeply, expected a JSON file") from error
        if isinstance(config, dict) and not kwargs.get("gguf_file"):
            announce(config, path, **of_the_hub)
        return config, rest

    get_config_dict.announces = True  # type: ignore[attr-defined]
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[method-assign, assignment, arg-type]
