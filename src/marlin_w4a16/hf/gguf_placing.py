"""A GGUF file as a checkpoint of a transformers model: FP4 linears and experts are layers, all else is dense."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints import gguf, gpt_oss
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.gguf_blocks import BLOCKS, Blocks, Placed
from marlin_w4a16.checkpoints.gguf_header import Header
from marlin_w4a16.checkpoints.layers import Contents, Layer, Problem, contents
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.hf.gguf_names import GGUFNames, Landing
from marlin_w4a16.modules.transformers_experts import is_experts
from marlin_w4a16.producers.found import is_linear

_Landed = list[tuple[Layer, Landing]]


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """A file, and where its tensors go in a model.

    Attributes:
        header: of the file.
        names: those of transformers.
        held: its layers and other tensors by their names in the model.
        dense: its own names of those that are loaded dense.
    """

    header: Header
    names: GGUFNames
    held: Contents
    dense: tuple[str, ...]

    def values(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is dense, on the CPU, by its names in the model."""
        made: dict[str, Tensor] = {}
        with Reader(torch.device("cpu")) as reader:
            for name in self.dense:
                before = set(made)
                self.names.made(name, _dense(self.header, name, reader), made)
                made |= {key: made[key].to(dtype) for key in made.keys() - before}
        return made


def placed(header: Header, scheme: Scheme, model: PreTrainedModel) -> GGUFModel:
    """Places the tensors of a file in a model that has no values yet.

    Raises:
        CheckpointError: transformers knows nothing of the architecture.
    """
    names, raw = GGUFNames(header, model), contents(gguf.entries(header), scheme)
    layers, problems, packed = dict[str, Layer](), list(raw.problems), set[str]()
    stacks: dict[str, _Landed] = {}
    for path, layer in raw.layers.items():
        landing = names.landing(f"{path}.weight", header.tensors[f"{path}.weight"].shape)
        if landing is None:
            continue
        parent, _, leaf = landing.name.rpartition(".")
        module = model.get_submodule(parent)
        if is_linear(type(module)) and leaf == "weight" and not landing.turned and landing.height == layer.n:
            layers[parent] = _linear(layer, parent, landing)
            packed.add(path)
        elif is_experts(module) and layer.experts:
            stacks.setdefault(parent, []).append((layer, landing))
            packed.add(path)
    for parent, landed in stacks.items():
        for one in _experts(parent, landed):
            if isinstance(one, Layer):
                layers[one.path] = one
            else:
                problems.append(one)
    mine = {f"{path}.{leaf}" for path in packed for leaf in ("weight", gguf.SCALE, gguf.INPUT_SCALE)}
    scales = {f"{path}.{gguf.SCALE}" for path in raw.layers}
    dense = tuple(n for n in header.tensors if n not in mine | scales and names.name(n) is not None)
    unknown = [path for path in raw.layers if path not in packed and names.name(f"{path}.weight") is None]
    notes = [f"{path}.weight: not loaded, transformers has no place for it" for path in unknown]
    others = dict(_entries(header, names, dense, model.state_dict()))
    return GGUFModel(header, names, Contents(layers, others, tuple(problems), (*raw.notes, *notes)), dense)


def _linear(layer: Layer, path: str, landing: Landing) -> Layer:
    order = landing.rows.argsort()  # of the file's rows
    order_or_none = None if torch.equal(order, torch.arange(len(order))) else order
    entries = {
        leaf: replace(entry, order=order_or_none) if isinstance(entry, Blocks) else entry
        for leaf, entry in layer.entries.items()
    }
    return replace(layer, path=path, entries=entries)


def _experts(path: str, landed: _Landed) -> Iterator[Layer | Problem]:
    """The layers of the experts of a module: one for each projection and expert, or as gpt-oss has them."""
    found: dict[str, _Landed] = {}
    for layer, landing in landed:
        found.setdefault(landing.name.rpartition(".")[2], []).append((layer, landing))
    for name, stacks in found.items():
        stacks.sort(key=lambda one: int(one[1].rows[0]))
        if sum(layer.n for layer, _ in stacks) != stacks[0][1].height:
            told = " and ".join(f"{layer.path} in {layer.format}" for layer, _ in stacks)
            yield Problem(stacks[0][0].file, f"{path}.{name}", f"{told} alone", "all of it in FP4")
            continue
        if all(landing.turned for _, landing in stacks):
            yield _alternating(f"{path}.{name}", stacks)
            continue
        leaves = ("gate_proj", "up_proj") if len(stacks) == 2 else (name,)
        at = 0
        for leaf, (layer, landing) in zip(leaves, stacks, strict=True):
            if not torch.equal(landing.rows, torch.arange(at, at + layer.n)) or landing.turned:
                yield Problem(layer.file, layer.path, "rows in another order", "those of gates, then those of ups")
                return
            at += layer.n
            storage = gguf.storage(_type(layer))
            for e in range(layer.experts):
                entries = {key: gguf.part_of(entry, e) for key, entry in layer.entries.items()}
                yield Layer(f"{path}.{e}.{leaf}", storage, layer.n, layer.k, layer.group, entries)


def _alternating(path: str, stacks: _Landed) -> Layer | Problem:
    """One layer of all experts, as OpenAI stores it, of stacks whose rows alternate."""
    layers, height = [layer for layer, _ in stacks], stacks[0][1].height
    first = layers[0]
    step = [torch.equal(landing.rows, torch.arange(i, height, len(stacks))) for i, (_, landing) in enumerate(stacks)]
    if not all(step) or first.fp4.kind != "e8m0" or len({(one.format, one.k, one.experts) for one in layers}) > 1:
        told = " and ".join(f"{one.path} in {one.format}" for one in layers)
        return Problem(first.file, path, told, "all rows of it in MXFP4, as OpenAI stores them")
    groups, entries = first.k // first.group, dict[str, Entry]()
    shapes = {"blocks": (groups, first.group // 2), "scales": (groups,)}
    for (leaf, shape), key in zip(shapes.items(), ("weight", gguf.BLOCK_SCALE), strict=True):
        parts = [entry for one in layers if isinstance(entry := one.entries[key], Blocks)]
        starts = tuple(part.starts[0] for part in parts)
        entries[leaf] = replace(parts[0], shape=(first.experts, height, *shape), starts=starts, rows=height)
    return Layer(path, gpt_oss.EXPERTS, height, first.k, first.group, entries)


def _type(layer: Layer) -> int:
    return next(number for number, block in BLOCKS.items() if block.kind == layer.fp4.kind)


def _entries(
    header: Header, names: GGUFNames, dense: tuple[str, ...], state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Entry]]:
    """The dense parameters as tensors of a file: where the numbers of elements agree, so do shapes after changes."""
    found: dict[str, int] = {}
    for name in dense:
        parameter = names.name(name)
        if parameter is not None:
            found[parameter] = found.get(parameter, 0) + math.prod(header.tensors[name].shape)
    for parameter, elements in found.items():
        wanted = tuple(state[parameter].shape) if parameter in state else ()
        yield parameter, Entry(header.file, "F32", wanted if math.prod(wanted) == elements else (elements,))


def _dense(header: Header, name: str, reader: Reader) -> Tensor:
    """The values of a tensor in float32, in the file's shape."""
    tensor = header.tensors[name]
    if tensor.type not in BLOCKS:
        from gguf import GGMLQuantizationType, dequantize

        stored = reader.tensor(Placed(header.file, "U8", (tensor.nbytes,), tensor.start, tensor.nbytes), name)
        return torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType(tensor.type))).view(tensor.shape)
    storage, (*lead, k) = gguf.storage(tensor.type), tensor.shape
    entries = dict(gguf.of_blocks(header, name, replace(tensor, shape=(math.prod(lead), k))))
    held = {key.rpartition(".")[2]: reader.tensor(entry, key) for key, entry in entries.items()}
    values = storage.read(held, name).decode(torch.float32).view(tensor.shape)
    scale = header.tensors.get(f"{name.removesuffix('.weight')}.{gguf.SCALE}")
    if scale is None:
        return values
    factor = reader.tensor(gguf.plain(header, scale), name)
    return values * factor.view(-1, *(1,) * (values.ndim - 1))
