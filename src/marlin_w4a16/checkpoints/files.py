"""The tensors of a checkpoint by their headers: which file, dtype and shape; no values are read."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HF_QUANT_CONFIG = "hf_quant_config.json"  # all that older exports of ModelOpt have
_AXES = 64  # that a tensor of torch may have
_MOST = 10_000  # files of an index
_LONGEST = 1000  # characters of the name of a file; a path may have 4096 bytes
# Bits of an element, by the name safetensors gives its dtype; all others have 8.
BITS = {
    "F4": 4, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64,
    "F64": 64,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names file, tensor, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        file: where it lies.
        dtype: as safetensors names it, such as ``"F8_E4M3"``.
        shape: its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * BITS.get(self.dtype, 8) // 8

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def files_of(folder: Path) -> list[Path]:
    """The weight files of a folder: the single one, else those its index names, as transformers has it.

    Raises:
        CheckpointError: there are none, one is missing, or the index points outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        found = ", ".join(sorted(p.name for p in folder.glob("*"))[:8]) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: found {found or 'an empty folder'}, expected {SINGLE} or {INDEX}")
    files = [folder / name for name in sorted(set(index_of(folder).values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: found no such file, expected it since {INDEX} names it: download it again")
    return files


def index_of(folder: Path) -> Mapping[str, str]:
    """Which file each tensor lies in, as the index of a folder says; what it says of tensors is not relied on.

    Raises:
        CheckpointError: it is no index, or it points outside the folder.
    """
    path = folder / INDEX
    index = read_json(path)
    found, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: weight_map: found {type(found).__name__}, expected tensors and their files")
    for name, file in found.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{path}: weight_map.{name}: found {type(file).__name__}, expected the name of a file"
            )
    if len(named := set(found.values())) > _MOST:
        raise CheckpointError(f"{path}: weight_map: found {len(named)} files, expected at most {_MOST}")
    for file in named:
        inside(folder, file)
        if Path(file).suffix != ".safetensors" or len(file) > _LONGEST or not file.isprintable():
            raise CheckpointError(f"{path}: weight_map: found the file {file[:200]!r}, expected one of safetensors")
    if not isinstance(metadata, dict):  # transformers reads it, too
        raise CheckpointError(f"{path}: metadata: found {type(metadata).__name__}, expected an object")
    return found


def inside(folder: Path, name: str) -> None:
    """Checks the name of a file of a folder.

    Raises:
        CheckpointError: it leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder / INDEX}: found the file {name[:200]!r}, expected one inside the folder")


def entries(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of some safetensors files by name.

    Raises:
        CheckpointError: a file is truncated or no safetensors file, or a tensor is there twice.
    """
    found: dict[str, Entry] = {}
    for file in files:
        for name, entry in _header(Path(file)).items():
            if name in found:
                raise CheckpointError(f"{file}: {name}: found it in {found[name].file.name} too, expected it once")
            found[name] = entry
    return found


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}: expected a JSON file") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: found {type(value).__name__}, expected a JSON object")
    return value


def quantization_of(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """The quantisation config of a folder and the file it stands in, or None; ``config.json`` goes first.

    Raises:
        CheckpointError: one of the files is no JSON object, or the config is none.
    """
    config = model_config_of(folder)
    for part in (config, config.get("text_config")):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if found is not None and not isinstance(found, dict):
            word = type(found).__name__
            raise CheckpointError(f"{folder / 'config.json'}: quantization_config: found {word}, expected an object")
        found = found or (part.get("quantization") if isinstance(part, dict) else None)  # of MLX
        if isinstance(found, dict) and found:
            return "config.json", found
    other = folder / HF_QUANT_CONFIG
    return (other.name, {**read_json(other), "quant_method": "modelopt"}) if other.is_file() else None


def model_config_of(folder: Path) -> dict[str, Any]:
    """The config of the model, empty where there is none."""
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def metadata_of(file: Path) -> dict[str, str]:
    """What the header of a safetensors file holds beside its tensors.

    Raises:
        CheckpointError: see `entries`.
    """
    with _opened(file) as opened:
        return dict(opened.metadata() or {})


def _header(file: Path) -> dict[str, Entry]:
    with _opened(file) as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        found = {name: Entry(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
    for name, entry in found.items():
        if len(entry.shape) > _AXES:
            raise CheckpointError(f"{file}: {name}: found {len(entry.shape)} axes, expected at most {_AXES}")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: found a {file.suffix or 'nameless'} file, expected safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {error}: expected a whole safetensors file: download it again") from error
