"""Checkpoints whose config.json does not say how they are quantised: another file of the folder does.

transformers (5.17 to 5.23 were read) asks no quantizer about a checkpoint without a ``quantization_config``, and would
load bytes as if they were weights. So its configs are read through here: `PreTrainedConfig.get_config_dict` is wrapped.
"""

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers import auto
from transformers.utils.hub import cached_file

from marlin_w4a16.checkpoints import files, mlx, registry
from marlin_w4a16.checkpoints.files import HF_QUANT_CONFIG, CheckpointError, Entry
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
        CheckpointError: it is no object that names a ``quant_method`` which somebody reads, or the index is none.
    """
    text = config.get("text_config")
    found = (part.get("quantization_config") for part in (config, text) if isinstance(part, dict))
    held = next((one for one in found if one is not None and one != {}), None)
    held = config.get("quantization") if held is None else held  # of MLX, which names no method
    if isinstance(held, dict) and mlx.is_mlx(held) and mlx.is_fp4(held):
        held = config["quantization_config"] = {**held, "quant_method": "mlx"}
    if held is None and "model_type" in config:
        other = cached_file(path, HF_QUANT_CONFIG, **_MAY_BE_MISSING, **of_the_hub)
        if other is not None:
            held = config["quantization_config"] = {**files.read_json(Path(other)), "quant_method": "modelopt"}
        elif _is_quantised(Path(path)):  # the quantizer asks for what is missing, unless the user gives it
            held = config["quantization_config"] = {"quant_method": "modelopt"}
    if held is None:
        return
    where = f"{path}: config.json: quantization_config"
    if not isinstance(held, dict):
        raise CheckpointError(f"{where}: found {type(held).__name__}, expected an object")
    method = held.get("quant_method")
    if not isinstance(method, str) and not (held.get("load_in_8bit") or held.get("load_in_4bit")):
        raise CheckpointError(f"{where}.quant_method: found {method!r}, expected a name such as 'modelopt'")
    if method is not None and not _is_read(held, config):
        _expect_nothing_packed(where, method, Path(path))
    if any(row.method == method for row in registry.FORMATS) and _has_index(Path(path)):
        files.index_of(Path(path))  # before transformers reads it, which expects that it is one
    config.setdefault("name_or_path", path)  # the quantizers are told of the config alone, and look at its folder


def _has_index(folder: Path) -> bool:
    return (folder / files.INDEX).is_file() and not (folder / files.SINGLE).is_file()


def _is_read(held: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a quantizer takes care of FP4; without one that it knows, transformers goes on as if all were dense."""
    method = held["quant_method"]
    if method == "fp8" or (method == "compressed-tensors" and not held.get("config_groups")):
        return registry.scheme_of(held, config) is not None
    return method in auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def _expect_nothing_packed(where: str, method: str, folder: Path) -> None:
    name = registry.stray(method, _tensors(folder))
    if name is not None:
        known = ", ".join(row.method for row in registry.FORMATS)
        raise CheckpointError(f"{where}.quant_method: found {method[:80]!r} beside {name}, expected one of {known}")


def _is_quantised(folder: Path) -> bool:
    try:
        return registry.stray(None, _tensors(folder)) is not None
    except CheckpointError:
        return False  # dense as far as is known: what is wrong with the files is told when they are read


def _tensors(folder: Path) -> dict[str, Entry | None]:
    """The tensors of a folder of this machine, of which those that its index names are known by their names only."""
    if (folder / files.SINGLE).is_file():
        return {**files.entries([folder / files.SINGLE])}
    if not _has_index(folder):
        return {}
    index = files.index_of(folder)
    first = folder / next(iter(index.values()))
    return {**dict.fromkeys(index), **(files.entries([first]) if first.is_file() else {})}


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
            raise CheckpointError(f"{path}: config.json: found deep nesting, expected a JSON file") from error
        if isinstance(config, dict) and not kwargs.get("gguf_file"):
            announce(config, path, **of_the_hub)
        return config, rest

    get_config_dict.announces = True  # type: ignore[attr-defined]
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[method-assign, assignment, arg-type]
