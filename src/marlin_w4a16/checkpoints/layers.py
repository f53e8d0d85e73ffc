"""What a checkpoint holds: its tensors held against its scheme, layer by layer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.scheme import Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage, Storage

# Leaves that only a quantised weight has, of any producer.
QUANTISED = {"weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale"}
# The end of a leaf where ModelOpt puts all experts of a transposed projection (gpt-oss, Llama-4) into one tensor.
STACK = "_proj_weight_scale"
# Leaves that may stand beside them: a bias, and the scales of a quantised cache.
BESIDE = {"bias", "k_scale", "v_scale", "q_scale"}
# ModelOpt: self_attn.k_proj.k_scale, compressed-tensors: self_attn.k_scale
CACHE_SCALE = re.compile(r"\.[qkv]_scale$")


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a checkpoint cannot be loaded.

    Attributes:
        file: where, or None.
        tensor: which tensor or layer.
        found, expected: what is wrong.
    """

    file: str | None
    tensor: str
    found: str
    expected: str

    def __str__(self) -> str:
        where = f"{self.file}: " if self.file else ""
        return f"{where}{self.tensor}: found {self.found}, expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantised weight of a checkpoint: of a linear, of one projection of an expert, or of that of all experts.

    Attributes:
        path: its path in the checkpoint.
        storage: how it is stored.
        n, k, group: rows, columns, columns that share a scale (0 for FP8).
        entries: its tensors by leaf, without the bias.
    """

    path: str
    storage: Storage
    n: int
    k: int
    group: int
    entries: Mapping[str, Entry]

    @property
    def format(self) -> str:
        """The name of the format for people."""
        return self.storage.format(self.group) if isinstance(self.storage, FP4Storage) else "FP8 E4M3"

    @property
    def fp4(self) -> FP4Storage:
        """How it is stored.

        Raises:
            TypeError: not as FP4.
        """
        if not isinstance(self.storage, FP4Storage):
            raise TypeError(f"{self.path}: found {self.format}, expected FP4")
        return self.storage

    @property
    def experts(self) -> int:
        """How many matrices it is, or 0: it is one."""
        return self.entries[self.storage.leaf("codes")].shape[0] if self.storage.stacked else 0

    @property
    def small(self) -> tuple[str, ...]:
        """The leaves of what is kept as it is stored when the weight is loaded, such as global scales."""
        big = {self.storage.leaf(role) for role in self.storage.big}
        return tuple(leaf for leaf in self.entries if leaf not in big)

    @property
    def file(self) -> str:
        """The name of the file of its first tensor."""
        return next(iter(self.entries.values())).file.name

    def name(self, leaf: str) -> str:
        """The name of a tensor in the checkpoint."""
        return f"{self.path}{self.storage.joint}{leaf}"

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in self.entries.values())


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        layers: its quantised weights by path, those that are right.
        others: all other tensors.
        problems: what is wrong with it.
    """

    layers: Mapping[str, Layer]
    others: Mapping[str, Entry]
    problems: tuple[Problem, ...]


def contents(entries: Mapping[str, Entry], scheme: Scheme) -> Contents:
    """Holds the tensors of a checkpoint against its scheme."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        path, leaf = scheme.split(name)
        modules.setdefault(path, {})[leaf] = entry
    layers: dict[str, Layer] = {}
    others: dict[str, Entry] = {}
    problems: list[Problem] = []
    refused: dict[Mismatch, list[str]] = {}
    for path, tensors in modules.items():
        found = _judge(path, tensors, scheme)
        if isinstance(found, Layer):
            layers[path] = found
        elif isinstance(found, Problem):
            problems.append(found)
        elif isinstance(found, Mismatch):
            refused.setdefault(found, []).append(path)
        mine = found.entries if isinstance(found, Layer) else {}
        others |= {scheme.name(path, leaf): e for leaf, e in tensors.items() if leaf not in mine}
    for why, paths in refused.items():  # once, not for each of hundreds of layers
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        problems.append(Problem(None, f"{paths[0]}{more}", why.found, why.expected))
    return Contents(layers, others, tuple(problems))


def _judge(path: str, tensors: Mapping[str, Entry], scheme: Scheme) -> Layer | Problem | Mismatch | None:
    """What the tensors of a module are; None: not quantised here, or no linear."""
    stack = next((leaf for leaf in tensors if leaf.endswith(STACK)), None)
    if stack is not None:
        name = stack.removesuffix("_weight_scale")
        return _problem(path, tensors, name, "all experts in one tensor", "one for each expert")
    storage = scheme.storage(path)
    if storage is None:
        return _stray(path, tensors, scheme)
    if not _is_quantised(storage, tensors):
        return None
    if isinstance(storage, Mismatch):
        return storage
    storage = storage.named(tensors) if isinstance(storage, FP4Storage) else storage
    for part in storage.parts:
        if part.leaf not in tensors and not part.optional:
            held = ", ".join(sorted(tensors))
            also = f", also called {' or '.join(part.aliases)}" if part.aliases else ""
            expected = f"one ({storage.label}{also})"
            return _problem(path, tensors, part.leaf, f"no such tensor beside {held}", expected, storage.joint)
        if part.leaf in tensors and tensors[part.leaf].dtype not in part.dtypes:
            found, expected = str(tensors[part.leaf]), f"dtype {' or '.join(part.dtypes)}"
            return _problem(path, tensors, part.leaf, found, expected, storage.joint)
    return _shaped(path, tensors, storage)


def _shaped(path: str, tensors: Mapping[str, Entry], storage: Storage) -> Layer | Problem:
    mine = {part.leaf: tensors[part.leaf] for part in storage.parts if part.leaf in tensors}
    codes, scales = (mine[storage.leaf(role)] for role in ("codes", "scales"))
    shape = storage.shape_of(mine)
    if shape is None:
        expected = f"{storage.scales} for codes {codes}"
        return _problem(path, tensors, storage.leaf("scales"), str(scales), expected, storage.joint)
    n, k, group = shape
    axes = {"e": codes.shape[0], "n": n, "k": k, "k/2": k // 2, "k/g": k // (group or 1), "g/2": group // 2}
    for part in storage.parts:
        if part.leaf in mine and not storage.fits(part, mine[part.leaf].shape, axes):
            return _problem(path, tensors, part.leaf, str(mine[part.leaf]), part.told(axes), storage.joint)
    for leaf in sorted(set(tensors) - set(mine) - BESIDE):
        return _problem(path, tensors, leaf, str(tensors[leaf]), f"no such tensor in {storage.label}")
    return Layer(path, storage, n, k, group, mine)


def _stray(path: str, tensors: Mapping[str, Entry], scheme: Scheme) -> Problem | None:
    """Packed tensors that the scheme knows nothing of; what compressed-tensors stores in other formats is its own."""
    ignored = scheme.ignored_by(path)
    stored = list(scheme.targets.values())
    codes = sorted({s.leaf("codes") for s in stored if isinstance(s, Storage)})
    leaf = next((leaf for leaf in codes if _packed(tensors.get(leaf))), None)
    if leaf is None or (ignored is None and None in stored):
        return None
    why = f"ignored by {ignored!r}" if ignored is not None else "not among the quantised layers"
    return _problem(path, tensors, leaf, str(tensors[leaf]), f"a dense weight: the config says it is {why}")


def _is_quantised(storage: Storage | Mismatch, tensors: Mapping[str, Entry]) -> bool:
    """Whether a module is quantised at all: it holds scales, or packed bytes for its weight."""
    known = {part.leaf for part in storage.parts} if isinstance(storage, Storage) else set()
    return bool((QUANTISED | known - {"weight"}) & set(tensors)) or _packed(tensors.get("weight"))


def _packed(entry: Entry | None) -> bool:
    return entry is not None and entry.dtype in ("U8", "I8", "U32", "F4", "F8_E4M3")


def _problem(
    path: str, tensors: Mapping[str, Entry], leaf: str, found: str, expected: str, joint: str = "."
) -> Problem:
    near = tensors.get(leaf) or next(iter(tensors.values()), None)
    return Problem(near.file.name if near else None, f"{path}{joint}{leaf}", found, expected)
