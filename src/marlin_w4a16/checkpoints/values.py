"""The small tensors of a checkpoint whose values decide whether it can be decoded: block and global scales."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer, Problem
from marlin_w4a16.checkpoints.storage import OF_INPUTS, FP4Storage, Part
from marlin_w4a16.kernels.fp4 import as_bytes
from marlin_w4a16.kernels.scale_bytes import e8m0_values, first_nan, scale_bytes


class Reader(ExitStack):
    """Reads tensors of a checkpoint to a device; a context, for whose length their files stay open."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._open = device, dict[Path, Any]()

    def tensor(self, entry: Entry, name: str, index: int | None = None) -> Tensor:
        """A tensor, or what it holds at an index of its first axis."""
        if entry.file not in self._open:
            from safetensors import safe_open

            self._open[entry.file] = self.enter_context(safe_open(entry.file, "pt", device=str(self._device)))
        file = self._open[entry.file]
        found: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
        return found

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of a layer by leaf."""
        return {leaf: self.tensor(entry, layer.name(leaf)) for leaf, entry in layer.entries.items()}


def read(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Some tensors by name, on the CPU."""
    with Reader(torch.device("cpu")) as reader:
        return {name: reader.tensor(entry, name) for name, entry in entries.items()}


def bad_values(layers: Iterable[Layer], inputs: bool = False) -> Iterator[Problem]:
    """NaN scales and global scales that are no numbers to multiply or divide by; reads from files to the CPU.

    Args:
        layers: whose.
        inputs: those of inputs, too, which are used only where these are quantised.
    """
    parts = [(layer, part) for layer in layers for part in layer.storage.parts if part.leaf in layer.entries]
    parts = parts if inputs else [(layer, part) for layer, part in parts if part.role not in OF_INPUTS]
    with Reader(torch.device("cpu")) as reader:
        for layer, part in parts:
            entry, name = layer.entries[part.leaf], layer.name(part.leaf)
            found = _wrong(reader.tensor(entry, name), layer, part) if part.role != "codes" else None
            if found is not None:
                yield Problem(entry.file.name, name, *found)


def _wrong(tensor: Tensor, layer: Layer, part: Part) -> tuple[str, str] | None:
    if part.role == "scales" and isinstance(layer.storage, FP4Storage):
        kind, floats = layer.storage.kind, tensor.dtype == torch.float32
        scales = scale_bytes(tensor, kind) if floats else as_bytes(tensor)
        at = first_nan(scales, kind)
        if at is None:
            return None
        if floats:
            return f"{float(tensor[tuple(at)])} at {at}", "powers of two, 2**-127 to 2**127"
        return f"NaN (byte {int(scales[tuple(at)]):#x}) at {at}", f"finite {kind} scales"
    if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):  # of MXFP8
        tensor = e8m0_values(tensor.view(torch.uint8))
    values = tensor.float()
    bad = ~torch.isfinite(values)
    if part.role.endswith("divisor"):
        bad |= ~torch.isfinite(values.reciprocal())
    if bool(bad.any()):
        return f"{float(values[bad][0])}", "finite numbers" + (", not 0" if part.role.endswith("divisor") else "")
    return None
