"""What loading a checkpoint did, told once: layers by format, and what was not taken as it was stored."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.passes.settings import ActivationQuant
from marlin_w4a16.text import collapse_paths, size, table


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """One quantised linear.

    Attributes:
        path: its module path.
        format: such as ``"NVFP4 group 16"``.
        stored: bytes of its tensors in the checkpoint.
        outcome: what became of it.
    """

    path: str
    format: str
    stored: int
    outcome: str

    @property
    def look(self) -> tuple[str, int, str]:
        """What equal layers have in common."""
        return self.format, self.stored, self.outcome


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded; ``print`` it for a table.

    Attributes:
        scheme: what the checkpoint's config says.
        layers: its quantised linears.
        notes: what is not as the producer made it.
    """

    scheme: Scheme
    layers: tuple[LoadedLayer, ...]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """One line: how many linears of which format."""
        counts = Counter(layer.format for layer in self.layers)
        parts = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
        stored = size(sum(layer.stored for layer in self.layers))
        return f"{self.scheme.producer} {self.scheme.algorithm}: {len(self.layers)} linears ({parts}), {stored}"

    def log(self, log: logging.Logger, seconds: float) -> None:
        """One INFO line with the time that packing took, and a WARNING for each note."""
        log.info("loaded %s, packed in %.1f s", self.summary(), seconds)
        for note in self.notes:
            log.warning("loaded %s: %s", self.scheme.producer, note)

    def __str__(self) -> str:
        rows = [("linear", "n", "format", "stored", "outcome")]
        for path, places in collapse_paths((layer.path, layer.look) for layer in self.layers):
            one = self.layers[places[0]]
            rows.append((path, str(len(places)), one.format, size(len(places) * one.stored), one.outcome))
        return "\n".join([table(rows), self.summary(), *self.notes])


def loaded(
    scheme: Scheme,
    layers: Mapping[str, Layer],
    others: Mapping[str, Entry],
    policy: ActivationQuant,
    dequantize: bool,
) -> Loaded:
    """What loading will do.

    Raises:
        CheckpointError: inputs are quantised, and the policy refuses that or cannot be followed.
    """
    told: dict[str, int] = Counter()
    rows: list[LoadedLayer] = []
    for path, layer in layers.items():
        storage = layer.storage
        if isinstance(storage, FP4Storage):
            outcome = "dense" if dequantize else "packed"
            activations = storage.activations
            if activations is not None and not dequantize:
                if policy == "refuse" or (policy == "keep" and activations.kind is None):
                    raise CheckpointError(
                        f"{path}: {activations.told}: found activation_quant={policy!r}, expected 'drop'"
                        + (" or 'keep'" if activations.kind is not None else "")
                    )
                told[f"{activations.told}; {_POLICY[policy]}"] += 1
        else:
            outcome = "dense, decoded from FP8"
            told["FP8 weights are decoded to the model's dtype: transformers cannot run ModelOpt's FP8"] += 1
        rows.append(LoadedLayer(path, layer.format, layer.nbytes, outcome))
    notes = tuple(f"{text} ({count} linears)" for text, count in told.items()) + scheme.notes
    return Loaded(scheme, tuple(rows), notes)


_POLICY = {"drop": "this is left out (activation_quant='drop')", "keep": "this is run (activation_quant='keep')"}
