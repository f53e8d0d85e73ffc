"""Which weights of a checkpoint are stored how, as its quantisation config says."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from marlin_w4a16.checkpoints.fp8 import Storage
from marlin_w4a16.checkpoints.names import Kind, Names

LINEAR = "Linear"
CACHE_NOTE = "its key/value cache was quantised; it is kept in 16 bits, its scales are not read"


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Why linears cannot be loaded, whatever their tensors are: what the config says of them, and what it may say."""

    found: str
    expected: str


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a quantisation config says.

    Attributes:
        producer: who wrote the checkpoint.
        algorithm: its name for the format.
        targets: how linears are stored by module path or by a pattern of paths (``"Linear"`` is every one), or why they
            cannot be loaded, or None: someone else loads them. A path goes before all else, then comes what is
            ignored, then patterns in their order.
        ignore: patterns of module paths that are dense.
        patterns: see `Names`.
        notes: what is not loaded, such as a quantised cache.
        joined: leaves that ``_`` joins to their paths, not ``.``.
        decodes: whether its quantizer decodes what is no linear, and is stored as it pleases.
        nested: leaves that have dots.
        known: how the producer may have stored weights of which the config does not say it.
        where: the file of the config and its place there, for errors.
    """

    producer: str
    algorithm: str
    targets: Mapping[str, Storage | Mismatch | None]
    ignore: tuple[str, ...] = ()
    patterns: Kind = "glob"
    notes: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    decodes: bool = False
    nested: tuple[str, ...] = ()
    known: tuple[Storage, ...] = ()
    where: str = "config.json: quantization_config"
    _ignored: Names = field(init=False, repr=False, compare=False)
    _targets: Names = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ignored", Names(self.ignore, self.patterns, f"{self.where}: what is ignored"))
        targets = (target for target in self.targets if target != LINEAR)
        object.__setattr__(self, "_targets", Names(targets, self.patterns, f"{self.where}: what is quantised"))

    def split(self, name: str) -> tuple[str, str]:
        """The path and the leaf of a tensor's name."""
        leaf = next((leaf for leaf in self.joined if name.endswith(f"_{leaf}")), None)
        leaf = next((leaf for leaf in self.nested if name.endswith(f".{leaf}")), leaf)
        path, _, last = name.rpartition(".")
        return (path, last) if leaf is None else (name[: -len(leaf) - 1], leaf)

    def storage(self, path: str) -> Storage | Mismatch | None:
        """How the linear at a path is stored; None: it is dense, or someone else's."""
        exact = self._targets.exact(path)
        if exact is None and self.ignored_by(path) is not None:
            return None
        found = exact or self._targets.find(path)
        return self.targets.get(LINEAR if found is None else found)

    def ignored_by(self, path: str) -> str | None:
        """The pattern by which a path is ignored."""
        return self._ignored.find(path)

    def left(self, path: str) -> bool:
        """Whether someone else loads the linear at a path."""
        found = self._targets.find(path) or LINEAR
        return self.ignored_by(path) is None and found in self.targets and self.targets[found] is None

    @property
    def shares(self) -> bool:
        """Whether someone else loads some weights."""
        return self.decodes or None in self.targets.values()

    @property
    def storages(self) -> tuple[Storage, ...]:
        """How weights are stored of which the config does not say it: as others, or as the producer may store them."""
        stored = (storage for storage in self.targets.values() if not isinstance(storage, Mismatch | None))
        return tuple(dict.fromkeys([*stored, *self.known]))
