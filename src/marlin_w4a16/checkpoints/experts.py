"""The experts of a mixture as a checkpoint holds them: a layer for each expert and projection, or one for all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.reader import Place, Reader
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.kernels.fp4 import FP4Weight

_AT_A_TIME = 32 << 20  # bytes; stacks that are not alike are there twice while they are put below each other


@dataclass(frozen=True, slots=True)
class Stack:
    """One projection of every expert, all of one shape and format.

    Attributes:
        name: of the projection in the checkpoint, such as ``"gate_proj"``.
        layers: one for each expert, or a single one that holds them all.
    """

    name: str
    layers: tuple[Layer, ...]

    @property
    def like(self) -> Layer:
        """A layer that tells shape and format of all."""
        return self.layers[0]

    @property
    def storage(self) -> FP4Storage:
        """See `Layer.fp4`."""
        return self.like.fp4

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.like.experts or len(self.layers)

    def read(self, expert: int, reader: Reader) -> dict[str, Tensor]:
        """The tensors of one expert by leaf; what is one for all is that of each."""
        return {leaf: reader.tensor(*self.place(expert, leaf)) for leaf in self.of(expert).entries}

    def of(self, expert: int) -> Layer:
        """The layer that holds an expert."""
        return self.layers[0 if self.like.experts else expert]

    def small(self, reader: Reader) -> dict[str, Tensor]:
        """The tensors beside codes and scales of all experts by leaf, ``[experts, ...]``, on the CPU.

        What belongs to inputs some may lack: zeros stand for theirs.
        """
        found, cpu = dict[str, Tensor](), torch.device("cpu")
        for leaf in dict.fromkeys(leaf for layer in self.layers for leaf in layer.small):
            having = [expert for expert in range(self.experts) if leaf in self.of(expert).entries]
            found[leaf] = held = reader.stacked([self.place(expert, leaf) for expert in having], cpu)
            if len(having) < self.experts:
                found[leaf] = held.new_zeros((self.experts, *held.shape[1:]))
                found[leaf][having] = held
        return found

    def place(self, expert: int, leaf: str) -> Place:
        """Where a tensor of an expert lies."""
        layer = self.of(expert)
        entry = layer.entries[leaf]
        of_each = bool(self.like.experts) and entry.shape[:1] == (self.experts,)
        return Place(entry, layer.name(leaf), expert if of_each else None)

    def weight(self, tensors: Mapping[str, Tensor]) -> FP4Weight:
        """The weight of the expert whose tensors these are."""
        return self.storage.read(tensors, self.like.path)

    def named(self, tensors: Iterator[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The inverse of `read` for the tensors of all experts in their order: the checkpoint's tensors by name."""
        if not self.like.experts:
            for layer, held in zip(self.layers, tensors, strict=True):
                yield from ((layer.name(leaf), held[leaf]) for leaf in layer.entries)
            return
        whole: dict[str, Tensor] = {}
        for expert, held in enumerate(tensors):
            for leaf, tensor in held.items():
                if self.like.entries[leaf].shape[:1] != (self.experts,):
                    whole[leaf] = tensor
                    continue
                if not expert:
                    whole[leaf] = tensor.new_empty((self.experts, *tensor.shape))
                whole[leaf][expert] = tensor
        yield from ((self.like.name(leaf), tensor) for leaf, tensor in whole.items())


def some_at_a_time(*stacks: Stack) -> Iterator[range]:
    """The experts of stacks, as many at a time as have 32 MB of codes and scales, but at least one."""
    experts = stacks[0].experts
    nbytes = sum(layer.nbytes for stack in stacks for layer in stack.layers)
    step = max(1, _AT_A_TIME * experts // max(1, nbytes))
    return (range(start, min(start + step, experts)) for start in range(0, experts, step))


def alike(stacks: Sequence[Stack]) -> bool:
    """Whether their tensors have the same names, dtypes and shapes, so that they are read as one."""
    looks = [
        (stack.storage, {leaf: (entry.dtype, entry.shape) for leaf, entry in stack.like.entries.items()})
        for stack in stacks
    ]
    return all(look == looks[0] for look in looks)


def read_weights(
    stacks: Sequence[Stack], experts: range, small: Mapping[str, Mapping[str, Tensor]], reader: Reader
) -> FP4Weight:
    """The weights of some experts in a row, ``[experts * stacks, n, k]``: those of one expert stand together.

    Args:
        stacks: see `alike`.
        experts: which.
        small: what `Stack.small` found, by the names of stacks.
        reader: reads to where the weights are made.
    """
    first, n = stacks[0], stacks[0].like.n
    if first.storage.layout.tiles or first.storage.layout.rows > 1:
        alone = [stack.weight(stack.read(e, reader)) for e in experts for stack in stacks]
        fields = (torch.stack([getattr(one, name) for one in alone]) for name in ("codes", "scales", "multiplier"))
        return alone[0].derived(*fields)
    codes, scales = first.storage.leaf("codes"), first.storage.leaf("scales")
    places = {leaf: [stack.place(e, leaf) for e in experts for stack in stacks] for leaf in (codes, scales)}
    tensors = {leaf: reader.stacked(of_all) for leaf, of_all in places.items()}
    layout = first.storage.layout
    if layout.transposed:
        tensors = {leaf: tensor.mT.contiguous() for leaf, tensor in tensors.items()}
    tensors = {leaf: tensor.flatten(0, 1) for leaf, tensor in tensors.items()}
    factor = first.storage.part("multiplier", "divisor", "amax")
    if factor is not None and factor.leaf in first.like.entries:  # one for each row of all that stand below each other
        some = slice(experts.start, experts.stop)
        each = [small[stack.name][factor.leaf][some].reshape(len(experts), 1, -1) for stack in stacks]
        tensors[factor.leaf] = torch.cat(each, 1).expand(-1, -1, n).flatten().to(tensors[codes].device)
    flat = replace(first.storage, layout=replace(layout, transposed=False)).read(tensors, first.like.path)
    return flat.derived(*(torch.unflatten(t, 0, (-1, n)) for t in (flat.codes, flat.scales, flat.multiplier)))


@dataclass(frozen=True, slots=True)
class StoredMixture:
    """The experts of one module, as files hold them.

    Attributes:
        path: of the module.
        first: the projections whose rows, one below the other, are the first product: gate and up, or one.
        second: the other product.
    """

    path: str
    first: tuple[Stack, ...]
    second: Stack

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """All projections."""
        return *self.first, self.second

    @property
    def layers(self) -> Iterator[Layer]:
        """The layers of all projections."""
        return (layer for stack in self.stacks for layer in stack.layers)

    @property
    def rows(self) -> int:
        """Rows of the first product of an expert."""
        return sum(stack.like.n for stack in self.first)

    @property
    def format(self) -> str:
        """The names of the formats for people."""
        return " and ".join(dict.fromkeys(stack.like.format for stack in self.stacks))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.nbytes for layer in self.layers)
