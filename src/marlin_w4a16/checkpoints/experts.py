"""The experts of a mixture as a checkpoint holds them: a layer for each expert and projection, or one for all."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.storage import FP4Storage
from marlin_w4a16.checkpoints.values import Reader
from marlin_w4a16.kernels.fp4 import FP4Weight


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

    @property
    def small(self) -> dict[str, Entry]:
        """What is kept of an expert as it is stored, by leaf, such as global scales; some may lack those of inputs."""
        kept: dict[str, Entry] = {}
        for layer in self.layers:
            kept |= {leaf: layer.entries[leaf] for leaf in layer.small if leaf not in kept}
        return kept

    def of(self, expert: int) -> Layer:
        """The layer that holds an expert."""
        return self.layers[0 if self.like.experts else expert]

    def read(self, expert: int, reader: Reader) -> dict[str, Tensor]:
        """The tensors of one expert by leaf; what is one for all is that of each."""
        layer, tensors = self.of(expert), dict[str, Tensor]()
        for leaf, entry in layer.entries.items():
            index = expert if self.like.experts and entry.shape[:1] == (self.experts,) else None
            tensors[leaf] = reader.tensor(entry, layer.name(leaf), index)
        return tensors

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
