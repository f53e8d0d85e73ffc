"""The small tensors of a checkpoint whose values decide whether it can be decoded: block and global scales."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer, Problem
from marlin_w4a16.checkpoints.reader import Place, Reader
from marlin_w4a16.checkpoints.storage import OF_INPUTS, FP4Storage, Part
from marlin_w4a16.kernels.fp4 import as_bytes
from marlin_w4a16.kernels.scale_bytes import ScaleKind, any_nan, e8m0_values, is_nan, scale_bytes

_AT_A_TIME = 32 << 20  # bytes, some for each thread of the reader


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
    looked_at = [_Small(layer, part) for layer in layers for part in layer.storage.parts if part.leaf in layer.entries]
    left_out = ("codes",) if inputs else ("codes", *OF_INPUTS)
    looked_at = [small for small in looked_at if small.part.role not in left_out]
    alike: dict[Hashable, list[int]] = {}
    for at, small in enumerate(looked_at):
        alike.setdefault(small.kind, []).append(at)
    with Reader(torch.device("cpu")) as reader:
        bad = [at for some in alike.values() for at in _bad_among(looked_at, some, reader)]
        for small in (looked_at[at] for at in sorted(bad)):
            yield Problem(small.place.entry.file.name, small.place.name, *small.told(reader.tensor(*small.place)))


@dataclass(frozen=True, slots=True)
class _Small:
    """A tensor that is looked at."""

    layer: Layer
    part: Part

    @property
    def place(self) -> Place:
        return Place(self.layer.entries[self.part.leaf], self.layer.name(self.part.leaf))

    @property
    def scales(self) -> ScaleKind | None:
        """How its bytes are read if it holds block scales of FP4."""
        storage = self.layer.storage
        return storage.kind if self.part.role == "scales" and isinstance(storage, FP4Storage) else None

    @property
    def kind(self) -> Hashable:
        """Those that are alike in it are read and looked at as one tensor."""
        return self.scales, self.part.role, self.place.entry.dtype, self.place.entry.shape

    def bad(self, tensor: Tensor) -> Tensor:
        """Which of its elements are wrong."""
        if self.scales is not None:
            return is_nan(_bytes(tensor, self.scales), self.scales)
        values = as_numbers(tensor)
        bad = ~values.isfinite()
        return bad | ~values.reciprocal().isfinite() if self.part.role.endswith("divisor") else bad

    def any_bad(self, tensor: Tensor) -> bool:
        """Whether some element is."""
        return (
            bool(self.bad(tensor).any()) if self.scales is None else any_nan(_bytes(tensor, self.scales), self.scales)
        )

    def told(self, tensor: Tensor) -> tuple[str, str]:
        """What was found and expected where the first wrong element stands."""
        at = self.bad(tensor).nonzero()[0].tolist()
        found = float(as_numbers(tensor)[tuple(at)])
        if self.scales is None:
            return f"{found}", "finite numbers" + (", not 0" if self.part.role.endswith("divisor") else "")
        if tensor.dtype == torch.float32:
            return f"{found} at {at}", "powers of two, 2**-127 to 2**127"
        byte = int(_bytes(tensor, self.scales)[tuple(at)])
        return f"NaN (byte {byte:#x}) at {at}", f"finite {self.scales} scales"


def _bad_among(looked_at: Sequence[_Small], alike: Sequence[int], reader: Reader) -> Iterator[int]:
    """The numbers of those that are wrong, of some that are alike."""
    one = looked_at[alike[0]]
    step = max(1, _AT_A_TIME // max(1, one.place.entry.nbytes))
    for start in range(0, len(alike), step):
        some = alike[start : start + step]
        tensors = reader.stacked([looked_at[at].place for at in some])
        if one.any_bad(tensors):
            each = one.bad(tensors).reshape(len(some), -1).any(-1).tolist()
            yield from (at for at, wrong in zip(some, each, strict=True) if wrong)


def as_numbers(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are E8M0 (MXFP8)."""
    is_e8m0 = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
    return e8m0_values(scales.view(torch.uint8)).float() if is_e8m0 else scales.float()


def _bytes(scales: Tensor, kind: ScaleKind) -> Tensor:
    return scale_bytes(scales, kind) if scales.dtype == torch.float32 else as_bytes(scales)
