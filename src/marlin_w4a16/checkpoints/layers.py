"""What a checkpoint holds: its tensors held against its scheme, layer by layer."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.fp8 import Storage
from marlin_w4a16.checkpoints.scheme import Mismatch, Scheme
from marlin_w4a16.checkpoints.storage import LOW_RANK, OF_INPUTS, FP4Storage, Role

# Leaves that only a quantised weight has, of any producer.
QUANTISED = {"weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale"}
# Leaves that may stand beside them: a bias, and the scales and offsets of a quantised cache.
BESIDE = {"bias", "k_scale", "v_scale", "q_scale", "k_bias", "v_bias"}
# ModelOpt: self_attn.k_proj.k_scale, with k_bias where the cache is NVFP4_AFFINE; compressed-tensors: self_attn.k_scale
CACHE_SCALE = re.compile(r"\.[qkv]_scale$|\.k_proj\.k_bias$|\.v_proj\.v_bias$")
_SHOWN = 300  # characters of what a config says
SHARD = re.compile(r"shard_\d+")  # of an embedding


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
        return self.storage.format(self.group)

    @property
    def fp4(self) -> FP4Storage:
        """How it is stored.

        Raises:
            TypeError: not as FP4.
        """
        if not isinstance(self.storage, FP4Storage):
            raise TypeError(f"{self.path}: found {self.format}, expected FP4")
        return self.storage

    def has(self, *roles: Role) -> bool:
        """Whether there is a tensor that plays one of some roles."""
        return any(part.role in roles and part.leaf in self.entries for part in self.storage.parts)

    @property
    def experts(self) -> int:
        """How many matrices it is, or 0: it is one."""
        return self.entries[self.storage.leaf("codes")].shape[0] if self.storage.stacked else 0

    @property
    def inputs(self) -> tuple[str, ...]:
        """The leaves of what belongs to the quantisation of inputs only."""
        return tuple(part.leaf for part in self.storage.parts if part.role in OF_INPUTS and part.leaf in self.entries)

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
        return f"{self.path}{self.storage.joint}{leaf}" if leaf else self.path

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
        notes: what is stored otherwise than its config says.
        shards: FP8 weights in shards, by path: the names of the shards, which are among the others, and their scale.
        wrong: the paths of what the problems are of.
    """

    layers: Mapping[str, Layer]
    others: Mapping[str, Entry]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    shards: Mapping[str, tuple[tuple[str, ...], str, Entry]] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Unsaid:
    """A weight that is stored otherwise than the config says, and what that says."""

    layer: Layer
    said: str


def contents(entries: Mapping[str, Entry], scheme: Scheme) -> Contents:
    """Holds the tensors of a checkpoint against its scheme."""
    layers: dict[str, Layer] = {}
    problems: list[Problem] = []
    refused: dict[Mismatch, list[str]] = {}
    unsaid: dict[tuple[str, str], list[str]] = {}
    wrong: list[str] = []
    modules = _modules(entries, scheme)
    shards = dict(_shards(modules))
    known = {*shards, *(name.removesuffix(".weight") for names, _, _ in shards.values() for name in names)}
    for path, tensors in ((path, tensors) for path, tensors in modules.items() if path not in known):
        found = _judge(path, tensors, scheme)
        if isinstance(found, _Unsaid):
            unsaid.setdefault((found.layer.format, found.said), []).append(path)
            found = found.layer
        if isinstance(found, Layer):
            layers[path] = found
            continue
        wrong += [path] if found is not None else []
        if isinstance(found, Problem):
            problems.append(found)
        elif isinstance(found, Mismatch):
            refused.setdefault(found, []).append(path)
    for why, paths in refused.items():  # once, not for each of hundreds of layers
        problems.append(Problem(scheme.where, counted(paths), why.found[:_SHOWN], why.expected))
    told = []
    for (form, said), paths in unsaid.items():
        told.append(f"{counted(paths)}: {form} as stored, though the config says {said}")
    mine = {layer.name(leaf) for layer in layers.values() for leaf in layer.entries}
    mine |= {scale for _, scale, _ in shards.values()}
    others = {name: entry for name, entry in entries.items() if name not in mine}
    return Contents(layers, others, tuple(problems), tuple(told), shards, tuple(wrong))


def counted(paths: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]


def _shards(modules: Mapping[str, Mapping[str, Entry]]) -> Iterator[tuple[str, tuple[tuple[str, ...], str, Entry]]]:
    """FP8 weights of ModelOpt in shards (embeddings of Qwen3.8), which have one scale: ``x.shard_0.weight``."""
    found: dict[str, list[str]] = {}
    for path, tensors in modules.items():
        parent, _, last = path.rpartition(".")
        if SHARD.fullmatch(last) and set(tensors) == {"weight"} and tensors["weight"].dtype == "F8_E4M3":
            found.setdefault(parent, []).append(f"{path}.weight")
    for path, names in found.items():
        scale = modules.get(path, {})
        if set(scale) == {"weight_scale"} and math.prod(scale["weight_scale"].shape) == 1:
            yield path, (tuple(names), f"{path}.weight_scale", scale["weight_scale"])


def _modules(entries: Mapping[str, Entry], scheme: Scheme) -> dict[str, dict[str, Entry]]:
    """The tensors of each module by leaf; that of a stack of experts which bears its path has an empty one."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        path, leaf = scheme.split(name)
        modules.setdefault(path, {})[leaf] = entry
    for path in [path for path in modules if path in entries]:
        parent, _, last = path.rpartition(".")
        modules[path][""] = modules[parent].pop(last)
    return {path: tensors for path, tensors in modules.items() if tensors}


def _judge(path: str, tensors: Mapping[str, Entry], scheme: Scheme) -> Layer | _Unsaid | Problem | Mismatch | None:
    """What the tensors of a module are; None: not quantised here, or no linear."""
    storage = scheme.storage(path)
    if storage is None and scheme.left(path):
        return None
    if storage is not None and not _is_quantised(storage, tensors):
        return None
    if isinstance(storage, Mismatch):
        return storage
    found = None if storage is None else _fitted(path, tensors, storage)
    if isinstance(found, Layer):
        return found
    if _is_quantised(storage, tensors):
        fits = (_fitted(path, tensors, other) for other in scheme.storages)
        unsaid = next((layer for layer in fits if isinstance(layer, Layer)), None)
        if unsaid is not None:
            return _Unsaid(unsaid, _said(path, storage, scheme))
    return found if found is not None else _stray(path, tensors, scheme)


def _said(path: str, storage: Storage | None, scheme: Scheme) -> str:
    """What a config says of a weight that is stored otherwise."""
    if storage is not None:
        return f"it is {storage.label}"
    ignored = scheme.ignored_by(path)
    return f"it is ignored by {ignored!r}" if ignored is not None else "it is not among the quantised layers"


def _fitted(path: str, tensors: Mapping[str, Entry], storage: Storage) -> Layer | Problem:
    """The tensors of a module as a weight that is stored so."""
    if "" in tensors and isinstance(storage, FP4Storage):
        storage = storage.of_stack()
    storage = storage.named(tensors)
    for part in storage.parts:
        if part.leaf not in tensors and not part.optional:
            held = ", ".join(sorted(leaf or path.rpartition(".")[2] for leaf in tensors))
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
    pair = [part.leaf for part in storage.parts if part.role in LOW_RANK]
    one = [leaf for leaf in pair if leaf in mine]
    if len(one) == 1:
        lost = next(leaf for leaf in pair if leaf not in mine)
        return _problem(path, tensors, lost, f"no such tensor beside {one[0]}", f"one ({storage.label})", storage.joint)
    rank = {"r": mine[one[0]].shape[0]} if one and mine[one[0]].shape else {}
    axes = {"e": codes.shape[0], "n": n, "k": k, "k/2": k // 2, "k/g": k // (group or 1), "g/2": group // 2, **rank}
    for part in storage.parts:
        if part.leaf in mine and not storage.fits(part, mine[part.leaf].shape, axes):
            return _problem(path, tensors, part.leaf, str(mine[part.leaf]), part.told(axes), storage.joint)
    for leaf in sorted(set(tensors) - set(mine) - BESIDE):
        return _problem(path, tensors, leaf, str(tensors[leaf]), f"no such tensor in {storage.label}")
    return Layer(path, storage, n, k, group, mine)


def _stray(path: str, tensors: Mapping[str, Entry], scheme: Scheme) -> Problem | None:
    """Packed tensors that the scheme knows nothing of."""
    codes = sorted({storage.leaf("codes") for storage in scheme.storages})
    leaf = next((leaf for leaf in codes if _packed(tensors.get(leaf))), None)
    if leaf is None:
        return None
    expected = f"a dense weight: the config says {_said(path, None, scheme)}"
    return _problem(path, tensors, leaf, str(tensors[leaf]), expected)


def _is_quantised(storage: Storage | Mismatch | None, tensors: Mapping[str, Entry]) -> bool:
    """Whether a module is quantised at all: it holds scales, or packed bytes for its weight."""
    known = {part.leaf for part in storage.parts} if isinstance(storage, Storage) else set()
    return bool((QUANTISED | known - {"weight"}) & set(tensors)) or _packed(tensors.get("weight"))


def _packed(entry: Entry | None) -> bool:
    return entry is not None and entry.dtype in ("U8", "I8", "U32", "F4", "F8_E4M3")


def _problem(
    path: str, tensors: Mapping[str, Entry], leaf: str, found: str, expected: str, joint: str = "."
) -> Problem:
    near = tensors.get(leaf) or next(iter(tensors.values()), None)
    return Problem(near.file.name if near else None, f"{path}{joint}{leaf}" if leaf else path, found, expected)
