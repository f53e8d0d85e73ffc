"""What `inspect` tells of a checkpoint: what each tensor is, what becomes of it, and how many bytes it takes."""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from marlin_w4a16.checkpoints import files, mlx
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.layers import CACHE_SCALE, QUANTISED, Contents, Layer, Problem, contents
from marlin_w4a16.checkpoints.registry import scheme_of
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.checkpoints.values import bad_values
from marlin_w4a16.cli.unread import unread
from marlin_w4a16.kernels.layout import packed_nbytes
from marlin_w4a16.report.progress import track
from marlin_w4a16.report.table import collapse_paths

Outcome = Literal["packed", "decoded", "dense", "unused", "left", "refused"]
PACKED = {"U8", "I8", "I32", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"}  # in which others keep quantised weights
_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte)$")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MOST = 8
SIZES = ("bytes", "loaded_bytes", "bf16_bytes")  # of a line


@dataclass(frozen=True, slots=True)
class Line:
    """Tensors that are told as one: a weight with its scales, a dense tensor, or the equal ones of many layers.

    Attributes:
        path: their paths, such as ``model.layers.{0..31}.mlp.up_proj``.
        count: how many they are.
        shape: of each; rows and columns of a linear, after the number of experts where it is of them all; None where
            they differ.
        format: such as ``"NVFP4 group 16"``, or the dtype as safetensors names it.
        outcome: ``"packed"``; ``"decoded"`` from FP8 and dense; ``"dense"`` as it is; ``"unused"``; ``"left"`` to
            transformers; or ``"refused"``.
        reason: why it is refused or unused, or that it is decoded from what is no FP4 linear.
        bytes: in the files.
        loaded_bytes: in a loaded model.
        bf16_bytes: in a model whose quantised linears are bfloat16, where headers tell how big those are.
    """

    path: str
    count: int
    shape: tuple[int, ...] | None
    format: str
    outcome: Outcome
    reason: str | None
    bytes: int
    loaded_bytes: int
    bf16_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        folder: where it lies.
        config: the file that holds its quantisation config, or None.
        producer: who quantised it, as far as the config says.
        algorithm: its name for the format.
        files, tensors: how many there are.
        layers: its quantised linears, those that are right; a projection of an expert counts as one.
        lines: all of its tensors.
        notes: what is not loaded as the producer made it, and what is needed to load it.
        problems: why it cannot be loaded.
    """

    folder: Path
    config: str | None
    producer: str | None
    algorithm: str | None
    files: int
    tensors: int
    layers: tuple[Layer, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def formats(self) -> Counter[str]:
        """How many FP4 linears there are of each format."""
        counts = Counter[str]()
        for layer in self.layers:
            if isinstance(layer.storage, FP4Storage):
                counts[layer.format] += layer.experts or 1
        return counts

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of FP4 and of FP8 linears, and the bytes of all lines."""
        sums = {name: sum(getattr(line, name) for line in self.lines) for name in SIZES}
        fp8 = sum(not isinstance(layer.storage, FP4Storage) for layer in self.layers)
        return {"fp4_linears": self.formats.total(), "fp8_linears": fp8, **sums}


def local(path: str) -> Path:
    """The folder of a checkpoint on this machine; its index may be named instead.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    if folder.name == files.INDEX and folder.is_file():
        return folder.parent
    if folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file()):
        return folder
    if folder.exists():
        raise CheckpointError(f"{path}: found a file, expected the folder of a checkpoint, or a GGUF file")
    if _HUB_NAME.fullmatch(path):
        raise CheckpointError(
            f"{path}: found no such folder, expected one on this machine: if it is a name on the hub, download it by "
            f"'hf download {path}', which prints its folder"
        )
    raise CheckpointError(f"{path}: found no such folder, expected that of a checkpoint")


def inspect(folder: Path, values: bool = False) -> Inspection:
    """Reads the configs and headers of a checkpoint, and with ``values`` looks for scales that cannot be decoded.

    Raises:
        CheckpointError: its files cannot be read, or do not belong together.
    """
    found = files.quantization_of(folder)
    config = found[1] if found is not None else {}
    paths = files.files_of(folder)
    entries = files.entries(track(paths, "Reading headers"))
    where = found[0] if found is not None else "config.json"
    scheme = scheme_of(config, files.model_config_of(folder), paths, where)
    held = Contents({}, entries, ()) if scheme is None else _without_embeddings(contents(entries, scheme), scheme)
    linears = collapsed(line_of(layer) for layer in held.layers.values())
    decoded = mlx.packed(held.others) if scheme is not None and scheme.producer == "MLX" else {}
    mine = {f"{path}.{leaf}" for path, tensors in decoded.items() for leaf in tensors}
    problems, notes, wide = _fit(folder, held, scheme) if scheme is not None else (unread(config, entries), (), ())
    held = replace(held, others={name: entry for name, entry in held.others.items() if name not in mine})
    return Inspection(
        folder,
        found[0] if found is not None else None,
        scheme.producer if scheme else config.get("quant_method", "MLX" if mlx.is_mlx(config) else None),
        scheme.algorithm if scheme else config.get("format"),
        len(paths),
        len(entries),
        tuple(held.layers.values()),
        (*linears, *_decoded(decoded, config), *other_lines(held, scheme, quantised=bool(config), wide=wide)),
        (*_notes(held, scheme), *notes),
        (*held.problems, *problems, *(bad_values(held.layers.values()) if values else ())),
    )


def _fit(folder: Path, held: Contents, scheme: Scheme) -> tuple[Sequence[Problem], Sequence[str], Collection[str]]:
    """What is wrong when a checkpoint is held against its model, what else is told, and what is kept in float32."""
    if held.problems:
        return (), (), ()  # once these are gone, the rest can be told
    if find_spec("transformers") is None:
        return (), ("not held against a model: transformers is not installed",), ()
    from marlin_w4a16.hf.fit import Fitted, fit, notes_of, problems_of

    found = fit(folder, held, scheme)
    return tuple(problems_of(found)), tuple(notes_of(found)), found.wide if isinstance(found, Fitted) else ()


def collapsed(lines: Iterable[Line]) -> list[Line]:
    """The lines that differ in the numbers of their paths only as one."""
    held = list(lines)
    groups = collapse_paths((line.path, replace(line, path="")) for line in held)
    return [_sum(path, [held[place] for place in places]) for path, places in groups]


def _sum(path: str, lines: list[Line]) -> Line:
    shapes, formats = {line.shape for line in lines}, dict.fromkeys(line.format for line in lines)
    sums = {name: sum(getattr(line, name) for line in lines) for name in ("count", *SIZES)}
    shape = shapes.pop() if len(shapes) == 1 else None
    return replace(lines[0], path=path, shape=shape, format=" + ".join(formats), **sums)


def line_of(layer: Layer) -> Line:
    """A weight that is loaded; beside it the checkpoint's small tensors are kept, such as global scales."""
    count, is_fp4 = layer.experts or 1, isinstance(layer.storage, FP4Storage)
    dense = 2 * count * layer.n * layer.k
    weight = count * packed_nbytes(layer.n, layer.k, layer.group) if is_fp4 else dense
    small = sum(layer.entries[leaf].nbytes for leaf in layer.small)
    shape = (layer.experts, layer.n, layer.k) if layer.experts else (layer.n, layer.k)
    outcome: Outcome = "packed" if is_fp4 else "decoded"
    return Line(layer.path, 1, shape, layer.format, outcome, None, layer.nbytes, weight + small, dense)


def _decoded(found: Mapping[str, Mapping[str, Entry]], config: Mapping[str, Any]) -> Iterator[Line]:
    """What MLX quantises beside linears, such as embeddings."""
    lines = []
    for path, tensors in found.items():
        k, nbytes = mlx.columns(tensors, config.get(path) or config), sum(entry.nbytes for entry in tensors.values())
        *rows, words = tensors["weight"].shape or (1,)
        dense, told = 2 * math.prod(rows) * k, f"{words * 32 // max(k, 1)} bits of MLX"
        lines.append(Line(path, 1, (*rows, k), told, "dense", "decoded", nbytes, dense, dense))
    yield from collapsed(lines)


def other_lines(held: Contents, scheme: Scheme | None, quantised: bool, wide: Collection[str] = ()) -> Iterator[Line]:
    """What is no linear of ours: refused, left, unused, dense; all but the largest dense matrices in few lines."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in held.others.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = entry
    odd = {path: names for path, names in modules.items() if quantised and _is_quantised(names)}
    problems = {problem.tensor.rpartition(".")[0]: problem for problem in held.problems}
    yield from collapsed(_odd(path, names, scheme, problems.get(path)) for path, names in odd.items())
    rest = {name: entry for path, names in modules.items() if path not in odd for name, entry in names.items()}
    yield from collapsed(_unused(name, entry) for name, entry in rest.items() if CACHE_SCALE.search(name))
    dense = [_dense(name, entry, name in wide) for name, entry in rest.items() if not CACHE_SCALE.search(name)]
    vectors = [line for line in dense if len(line.shape or ()) <= 1]
    matrices = collapsed(line for line in dense if len(line.shape or ()) > 1)
    largest = sorted(matrices, key=lambda line: line.bytes, reverse=True)[:_MOST]
    yield from (line for line in matrices if line in largest)
    smaller = [line for line in matrices if line not in largest]
    for path, lines in (("other matrices", smaller), ("norms, biases and other vectors", vectors)):
        if lines:
            yield _sum(path, lines)


def _is_quantised(names: Mapping[str, Entry]) -> bool:
    leaves = {name.rpartition(".")[2] for name in names}
    return bool(leaves & QUANTISED) or any(entry.dtype in PACKED for entry in names.values())


def _odd(path: str, names: Mapping[str, Entry], scheme: Scheme | None, problem: Problem | None) -> Line:
    """A quantised module that is not loaded here."""
    if problem is None and scheme is not None:
        problem = next(iter(contents(names, scheme).problems), None)
    largest, total = max(names.values(), key=lambda entry: entry.nbytes), sum(entry.nbytes for entry in names.values())
    if problem is not None:
        reason = f"found {problem.found}, expected {problem.expected}"
        return Line(path, 1, largest.shape, largest.dtype, "refused", reason, total, 0, 0)
    bf16 = 2 * math.prod(largest.shape) if largest.dtype.startswith("F8") else total
    return Line(path, 1, largest.shape, largest.dtype, "left", None, total, total, bf16)


def _unused(name: str, entry: Entry) -> Line:
    reason = "a scale of the key/value cache"
    return Line(name, 1, entry.shape, entry.dtype, "unused", reason, entry.nbytes, 0, 0)


def _dense(name: str, entry: Entry, is_widened: bool) -> Line:
    held = entry.nbytes * (2 if is_widened else 1)
    return Line(name.removesuffix(".weight"), 1, entry.shape, entry.dtype, "dense", None, entry.nbytes, held, held)


def _without_embeddings(held: Contents, scheme: Scheme) -> Contents:
    """Quantised embeddings are refused once the model is known; headers tell them where the config names the class."""
    if "Embedding" not in scheme.targets:
        return held
    layers, others, problems = dict(held.layers), dict(held.others), list(held.problems)
    for path, layer in held.layers.items():
        if _EMBEDDING.search(path):
            name, expected = f"{path}.{next(iter(layer.entries))}", "a linear: the config's targets say Embedding"
            problems.append(Problem(layer.file, name, f"{layer.format} of an embedding", expected))
            others |= {f"{path}.{leaf}": entry for leaf, entry in layers.pop(path).entries.items()}
    return Contents(layers, others, tuple(problems), held.notes)


def _notes(held: Contents, scheme: Scheme | None) -> Iterator[str]:
    storages = [layer.storage for layer in held.layers.values()]
    activations = Counter(s.activations for s in storages if isinstance(s, FP4Storage) and s.activations)
    for one, count in activations.items():
        kept = ", unless activation_quant='keep'" if one.kind is not None else ""
        yield f"{one.told}; this is left out{kept} ({count} linears)"
    if decoded := sum(not isinstance(storage, FP4Storage) for storage in storages):
        yield f"FP8 weights are decoded to the model's dtype ({decoded} linears)"
    yield from scheme.notes if scheme is not None else ()
    yield from held.notes
