"""A seed makes a spoiled checkpoint: which, what is done to it, and what it is worth then."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from spoiled import configs, indexes, raw, tensors
from spoiled.healthy import KINDS, healthy
from spoiled.parts import Parts

SPOILERS = {**configs.SPOILERS, **indexes.SPOILERS, **tensors.SPOILERS, **raw.SPOILERS}
_MOST = (1, 1, 1, 2, 2, 3)  # spoilers at a time
_ROOMS = (configs.SPOILERS, configs.SPOILERS, indexes.SPOILERS, tensors.SPOILERS, tensors.SPOILERS, raw.SPOILERS)


@dataclass(frozen=True, slots=True)
class Case:
    """A spoiled checkpoint, not written yet.

    Attributes:
        seed: gives it again.
        kind: one of `KINDS`.
        spoilers: what was done, in order.
        words: of each, those of which a refusal must have one.
        parts: what is written.
    """

    seed: int
    kind: str
    spoilers: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    parts: Parts

    @property
    def name(self) -> str:
        return f"{self.kind}, {' + '.join(self.spoilers)} (seed {self.seed})"


def generate(seed: int) -> Case:
    """The case of a seed; the same at each call."""
    rng = Random(seed)
    kind = rng.choice(KINDS)
    parts = Parts.of(healthy(kind), sharded=rng.random() < 0.4)
    done, words = list[str](), list[tuple[str, ...]]()
    for room in rng.sample(_ROOMS, rng.choice(_MOST)):
        if room is indexes.SPOILERS and parts.index is None:
            parts = Parts.of(healthy(kind), sharded=True) if not done else parts
            room = room if not done else raw.SPOILERS
        name = rng.choice(sorted(room))
        if name in done:
            continue
        if name in configs.SPOILERS and not (parts.quantization[1] and isinstance(parts.quantization[1], dict)):
            name = "config: of text"  # there is nothing left to be spoiled
        words.append(SPOILERS[name](parts, rng))
        done.append(name)
    return Case(seed, kind, tuple(done), tuple(words), parts)
