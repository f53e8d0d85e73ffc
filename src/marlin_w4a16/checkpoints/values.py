"""The small tensors of a checkpoint whose values decide whether it can be decoded: block and global scales."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer, Problem
from marlin_w4a16.checkpoints.storage import FP4Storage, Part
from marlin_w4a16.kernels.fp4 import E8M0_NAN, as_bytes

_READ = ("scales", "multiplier", "divisor", "pre-quant scale", "input multiplier", "input divisor")


def read(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Some tensors by name, on the CPU."""
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in {entry.file for entry in entries.values()}:
        with safe_open(file, "pt", device="cpu") as opened:
            found |= {name: opened.get_tensor(name) for name, entry in entries.items() if entry.file == file}
    return found


def bad_values(layers: Iterable[Layer]) -> Iterator[Problem]:
    """NaN scales and global scales that are no numbers to multiply or divide by; reads from files to the CPU."""
    from safetensors import safe_open

    wanted: dict[Path, list[tuple[Layer, Part]]] = {}
    for layer in layers:
        for part in layer.storage.parts:
            if part.leaf in layer.entries and part.role in _READ:
                wanted.setdefault(layer.entries[part.leaf].file, []).append((layer, part))
    for file, parts in wanted.items():
        with safe_open(file, "pt", device="cpu") as opened:
            for layer, part in parts:
                name = f"{layer.path}.{part.leaf}"
                found = _wrong(opened.get_tensor(name), layer, part)
                if found is not None:
                    yield Problem(file.name, name, *found)


def _wrong(tensor: Tensor, layer: Layer, part: Part) -> tuple[str, str] | None:
    if part.role == "scales" and isinstance(layer.storage, FP4Storage):
        scales = as_bytes(tensor)
        nan = (scales & 0x7F) == 0x7F if layer.storage.kind == "e4m3" else scales == E8M0_NAN
        if bool(nan.any()):
            at = nan.nonzero()[0].tolist()
            return f"NaN (byte {int(scales[tuple(at)]):#x}) at {at}", f"finite {layer.storage.kind} scales"
        return None
    values = tensor.float()
    bad = ~torch.isfinite(values)
    if part.role.endswith("divisor"):
        bad |= ~torch.isfinite(values.reciprocal())
    if bool(bad.any()):
        return f"{float(values[bad][0])}", "finite numbers" + (", not 0" if part.role.endswith("divisor") else "")
    return None
