"""Single files of ComfyUI and of Black Forest Labs: models of diffusion, some of whose weights are NVFP4 or FP8.

ComfyUI (comfy-kitchen 0.2.40) says of each layer how it is stored, in a tensor ``comfy_quant`` of JSON's bytes or in
the header of the file. Its NVFP4 has the even column in the high nibble, rows and columns padded to 16, and scales in
tiles of 128 by 4, padded too. Files without a word are those of Black Forest Labs, who store what ModelOpt does.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import CheckpointError, Entry, entries, metadata_of
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.kernels.fp4 import FP4Weight, fp4_weight
from marlin_w4a16.kernels.scale_bytes import unswizzle

SAID, HEADER = "comfy_quant", "_quantization_metadata"
BESIDE = (SAID, "weight_scale", "weight_scale_2", "input_scale")  # a weight, none of which the model has
_GROUP = 16
_FORMATS = ("nvfp4", "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight that is not dense.

    Attributes:
        path: of its layer in the file.
        format: ``"nvfp4"`` or ``"float8_e4m3fn"``.
        producer: ``"ComfyUI"`` or ``"Black Forest Labs"``.
        n, k: rows and columns as they are stored, padded.
    """

    path: str
    format: str
    producer: str
    n: int
    k: int

    def fp4(self, tensors: Mapping[str, Tensor]) -> FP4Weight:
        """The weight ``[n, k]``, given the tensors of the file by leaf."""
        codes, scales = tensors["weight"], tensors["weight_scale"]
        if self.producer == "ComfyUI":
            codes = codes << 4 | codes >> 4
            scales = unswizzle(scales.view(torch.uint8), self.n, self.k // _GROUP).view(torch.float8_e4m3fn)
        return fp4_weight(codes, scales, tensors["weight_scale_2"], name=self.path)

    def dense(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The exact values of one in FP8, float32 ``[n, k]``."""
        scale = tensors["weight_scale"].float()
        return tensors["weight"].float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)


def stored(file: Path) -> dict[str, Stored]:
    """The weights of a file that are not dense, by path.

    Raises:
        CheckpointError: it is no safetensors file, or holds what is not read here.
    """
    found = entries([file])
    said = dict(_said(file, found))
    paths = {name.rpartition(".")[0] for name in found if name.rpartition(".")[2] in ("weight_scale", SAID)} | set(said)
    return {path: _stored(file, path, said.get(path), found) for path in sorted(paths)}


def _said(file: Path, found: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """The format of each layer of ComfyUI, as the file says it."""
    text = metadata_of(file).get(HEADER)
    if text is not None:
        layers = _parsed(text, f"{file}: {HEADER}").get("layers")
        if not isinstance(layers, dict):
            raise CheckpointError(f"{file}: {HEADER}.layers: found {type(layers).__name__}, expected an object")
        for path, value in layers.items():
            yield path, _format(value, f"{file}: {HEADER}.layers.{path}")
    with Reader(torch.device("cpu")) as reader:
        for name, entry in found.items():
            if name.endswith(f".{SAID}"):
                where = f"{file}: {name}"
                if entry.dtype != "U8":
                    raise CheckpointError(f"{where}: found {entry}, expected bytes of JSON")
                text = bytes(reader.tensor(entry, name).tolist()).decode("utf-8", "replace")
                yield name.removesuffix(f".{SAID}"), _format(_parsed(text, where), where)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: found {text[:80]!r}, expected JSON") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: found {type(value).__name__}, expected an object")
    return value


def _format(value: Any, where: str) -> str:
    name = value.get("format") if isinstance(value, dict) else None
    if name not in _FORMATS:
        raise CheckpointError(f"{where}: format: found {name!r}, expected {' or '.join(_FORMATS)}")
    return str(name)


def _stored(file: Path, path: str, said: str | None, found: Mapping[str, Entry]) -> Stored:
    held = {leaf: found[name] for leaf in ("weight", *BESIDE) if (name := f"{path}.{leaf}") in found}
    weight = held.get("weight")
    if weight is None or len(weight.shape) != 2:
        raise CheckpointError(f"{file}: {path}.weight: found {weight or 'no such tensor'}, expected a matrix")
    format = said or ("nvfp4" if weight.dtype == "U8" else "float8_e4m3fn")
    producer = "Black Forest Labs" if said is None else "ComfyUI"
    n, k = weight.shape[0], weight.shape[1] * (2 if format == "nvfp4" else 1)
    is_fp4 = format == "nvfp4"
    dtypes = {"weight": "U8" if is_fp4 else "F8_E4M3", "weight_scale": "F8_E4M3" if is_fp4 else "F32"}
    shapes: dict[str, list[tuple[int, ...]]] = {"weight_scale": [(), (1,), (n,), (n, 1)]}
    if is_fp4:
        groups = k // _GROUP
        rows: list[tuple[int, ...]] = (
            [(n, groups)] if producer != "ComfyUI" else [(-(-n // 128) * 128, -(-groups // 4) * 4)]
        )
        dtypes["weight_scale_2"] = "F32"
        padded = -(-n // 16) * 16 if producer == "ComfyUI" else n
        shapes = {"weight": [(padded, weight.shape[1])], "weight_scale": rows, "weight_scale_2": [(), (1,)]}
    for leaf, dtype in dtypes.items():
        one, wanted = held.get(leaf), shapes.get(leaf)
        if one is None or one.dtype != dtype or (wanted is not None and one.shape not in wanted) or k % _GROUP:
            told = f"{dtype} {' or '.join(str(list(shape)) for shape in wanted or [weight.shape])}"
            raise CheckpointError(f"{file}: {path}.{leaf}: found {one or 'no such tensor'}, expected {told}")
    return Stored(path, format, producer, n, k)
