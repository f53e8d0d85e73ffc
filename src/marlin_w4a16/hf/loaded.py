"""What loading a checkpoint did, told once: layers by format, and what was not taken as it was stored."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from marlin_w4a16.checkpoints.experts import StoredMixture
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import Activations, FP4Storage
from marlin_w4a16.passes.settings import ActivationQuant
from marlin_w4a16.report.table import collapse_paths, size, table


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """One quantised linear, or the experts of one module.

    Attributes:
        path: its module path.
        format: such as ``"NVFP4 group 16"``.
        stored: bytes of its tensors in the checkpoint.
        outcome: what became of it.
        experts: how many it is of, or 0: a linear.
    """

    path: str
    format: str
    stored: int
    outcome: str
    experts: int = 0


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
        """One line: how many linears and experts of which format."""
        told = []
        for experts, what in ((False, "linears"), (True, "mixtures of experts")):
            counts = Counter(layer.format for layer in self.layers if bool(layer.experts) == experts)
            parts = ", ".join(f"{count} {name}" for name, count in counts.items())
            told += [f"{counts.total()} {what} ({parts})"] if counts else []
        stored = size(sum(layer.stored for layer in self.layers))
        return f"{self.scheme.producer} {self.scheme.algorithm}: {', '.join(told) or 'no FP4 weights'}, {stored}"

    def log(self, log: logging.Logger, seconds: float) -> None:
        """One INFO line with the time that packing took, and a WARNING for each note."""
        log.info("loaded %s, packed in %.1f s", self.summary(), seconds)
        for note in self.notes:
            log.warning("loaded %s: %s", self.scheme.producer, note)

    def __str__(self) -> str:
        rows = [("weight", "n", "format", "stored", "outcome")]
        for path, places in collapse_paths((layer.path, replace(layer, path="")) for layer in self.layers):
            one = self.layers[places[0]]
            form = f"{one.format}, {one.experts} experts" if one.experts else one.format
            rows.append((path, str(len(places)), form, size(len(places) * one.stored), one.outcome))
        return "\n".join([table(rows), self.summary(), *self.notes])


def loaded(
    scheme: Scheme,
    layers: Mapping[str, Layer],
    mixtures: Iterable[StoredMixture],
    policy: ActivationQuant,
    dequantize: bool,
) -> Loaded:
    """What loading will do.

    Raises:
        CheckpointError: inputs are quantised, and the policy refuses that or cannot be followed.
    """
    told, rows, outcome = Counter[str](), list[LoadedLayer](), "dense" if dequantize else "packed"

    def tell(path: str, activations: Activations | None, can_keep: bool, what: str) -> None:
        if activations is not None and not dequantize:
            told[f"{activations.told}; {_followed(policy, path, activations, can_keep)} ({{}} {what})"] += 1

    for path, layer in layers.items():
        if isinstance(layer.storage, FP4Storage):
            activations = layer.storage.activations
            tell(path, activations, activations is not None and activations.kind is not None, "linears")
            rows.append(LoadedLayer(path, layer.format, layer.nbytes, outcome))
        else:
            text = f"FP8 weights are decoded to the model's dtype: transformers cannot run {scheme.producer}'s FP8"
            told[f"{text} ({{}} linears)"] += 1
            rows.append(LoadedLayer(path, layer.format, layer.nbytes, "dense, decoded from FP8"))
    for mixture in mixtures:
        tell(mixture.path, mixture.second.storage.activations, False, "mixtures of experts")
        rows.append(LoadedLayer(mixture.path, mixture.format, mixture.nbytes, outcome, mixture.second.experts))
    notes = tuple(text.format(count) for text, count in told.items()) + scheme.notes
    return Loaded(scheme, tuple(rows), notes)


def _followed(policy: ActivationQuant, path: str, activations: Activations, can_keep: bool) -> str:
    if policy == "refuse" or (policy == "keep" and not can_keep):
        raise CheckpointError(
            f"{path}: {activations.told}: found activation_quant={policy!r}, expected 'drop'"
            + (" or 'keep'" if can_keep else "")
        )
    return _POLICY[policy]


_POLICY = {"drop": "this is left out (activation_quant='drop')", "keep": "this is run (activation_quant='keep')"}
