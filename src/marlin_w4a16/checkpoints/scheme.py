"""Which weights of a checkpoint are stored how, as its quantisation config says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from marlin_w4a16.checkpoints.storage import Storage

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
            cannot be loaded, or None: someone else loads them. A path goes before patterns, they go in their order.
        ignore: patterns of module paths that are dense.
        patterns: ``"glob"``, or ``"re"``: regular expressions where they begin with ``re:``, else exact names.
        notes: what is not loaded, such as a quantised cache.
        joined: leaves that ``_`` joins to their paths, not ``.``.
    """

    producer: str
    algorithm: str
    targets: Mapping[str, Storage | Mismatch | None]
    ignore: tuple[str, ...] = ()
    patterns: Literal["glob", "re"] = "glob"
    notes: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    def split(self, name: str) -> tuple[str, str]:
        """The path and the leaf of a tensor's name."""
        leaf = next((leaf for leaf in self.joined if name.endswith(f"_{leaf}")), None)
        path, _, last = name.rpartition(".")
        return (path, last) if leaf is None else (name[: -len(leaf) - 1], leaf)

    def name(self, path: str, leaf: str) -> str:
        """The inverse of `split`."""
        return f"{path}{'_' if leaf in self.joined else '.'}{leaf}" if path else leaf

    def storage(self, path: str) -> Storage | Mismatch | None:
        """How the linear at a path is stored; None: it is dense, or someone else's."""
        if self.ignored_by(path) is not None:
            return None
        if path in self.targets:
            return self.targets[path]
        patterns = (p for p in self.targets if p == LINEAR or self._matches(path, p))
        return self.targets.get(next(patterns, ""))

    def ignored_by(self, path: str) -> str | None:
        """The pattern by which a path is ignored."""
        return next((pattern for pattern in self.ignore if self._matches(path, pattern)), None)

    def _matches(self, path: str, pattern: str) -> bool:
        if self.patterns == "glob":
            return fnmatchcase(path, pattern) or path.startswith(f"{pattern}.")
        if pattern.startswith("re:"):
            return re.match(pattern.removeprefix("re:"), path) is not None
        return pattern == path
