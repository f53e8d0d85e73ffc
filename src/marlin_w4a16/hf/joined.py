"""Linears that a checkpoint holds as several, one below the other, where transformers has one (MiniMax-M3)."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.checkpoints.storage import DTYPES, FP4Storage
from marlin_w4a16.hf.dense import decoded, joined, plain_linear
from marlin_w4a16.hf.linear import fp8, fp8_tensors
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.packed_linear import PackedLinear


class StoredParts(nn.Module):
    """Stands for such a linear while transformers loads all else; its bias is loaded by its own name.

    Args:
        layers: what the checkpoint holds, in order.
        bias: of the linear, or None.
        dtype: of the model.
    """

    bias: nn.Parameter | None

    def __init__(self, layers: Sequence[Layer], bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers, self.dtype = tuple(layers), dtype
        self.register_parameter("bias", bias)

    def loaded(self, reader: Reader) -> "CheckpointParts | FP8Parts":
        """The linear that runs, packed on the device of the reader."""
        runs = CheckpointParts if isinstance(self.layers[0].storage, FP4Storage) else FP8Parts
        tensors = reader.tensors(self.layers)
        return runs(self.layers, tensors, self.bias, self.dtype).train(self.training)

    def dense(self, reader: Reader, dtype: torch.dtype) -> nn.Linear:
        """A plain linear with the exact weight rounded once to ``dtype``."""
        return self.loaded(reader).dense(dtype)

    def forward(self, *_: Tensor) -> Tensor:
        """Never called: it is loaded before a model runs."""
        raise RuntimeError(f"{self.layers[0].path}: found a linear that is not loaded yet, expected a loaded model")


class CheckpointParts(PackedLinear):
    """A `PackedLinear` of several stored weights, which it can give back, bit for bit.

    Args:
        layers, tensors: what the checkpoint holds, and the tensors of each by leaf.
        bias, dtype: see `PackedLinear`.
    """

    def __init__(
        self, layers: Sequence[Layer], tensors: Sequence[Mapping[str, Tensor]], bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        stored = [layer.fp4.read(held, layer.path) for layer, held in zip(layers, tensors, strict=True)]
        fitted = [weight.fit_first(torch.float16, dtype) for weight in stored]
        super().__init__(joined(fitted), bias, dtype)
        self.layers = tuple(layers)
        for at, (layer, held) in enumerate(zip(layers, tensors, strict=True)):
            for leaf in layer.small:
                self.register_bits(f"{leaf}_{at}", held[leaf])
            rows = (fitted[at].scales != stored[at].scales).any(-1).nonzero()[:, 0]  # see CheckpointLinear
            self.register_bits(f"unfitted_rows_{at}", rows, persistent=False)
            self.register_bits(f"unfitted_scales_{at}", stored[at].scales[rows], persistent=False)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors by name, bit for bit, on the CPU, without the bias.

        Raises:
            CheckpointError: see `CheckpointLinear.stored`.
        """
        whole = self.to_fp4(self.layers[0].path)
        for at, (layer, rows) in enumerate(rows_of(self.layers)):
            small = {leaf: getattr(self, f"{leaf}_{at}").detach() for leaf in layer.small}
            unfitted = getattr(self, f"unfitted_rows_{at}"), getattr(self, f"unfitted_scales_{at}")
            held: FP4Weight = whole.derived(whole.codes[rows], whole.scales[rows], whole.multiplier[rows])
            tensors = layer.fp4.restore(held, unfitted, small, layer.entries, layer.path)
            yield from ((layer.name(leaf), tensor) for leaf, tensor in tensors.items())

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """See `StoredParts.dense`."""
        return plain_linear(decoded(self.to_fp4(self.layers[0].path), dtype), self.bias)


class FP8Parts(nn.Linear):
    """A linear whose parts were stored in FP8, and which runs dense; it can give them back.

    Args: see `CheckpointParts`.
    """

    def __init__(
        self, layers: Sequence[Layer], tensors: Sequence[Mapping[str, Tensor]], bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(layers[0].k, sum(layer.n for layer in layers), bias=bias is not None, device="meta")
        self.layers, self.loaded_as = tuple(layers), dtype
        parts = [fp8(layer).read(held, dtype) for layer, held in zip(layers, tensors, strict=True)]
        self.weight = nn.Parameter(torch.cat(parts), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]
        for at, (layer, held) in enumerate(zip(layers, tensors, strict=True)):
            for leaf in layer.small:  # kept as bytes, which casts leave alone
                self.register_buffer(f"{leaf}_{at}", held[leaf].reshape(-1).view(torch.uint8), persistent=False)

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """See `CheckpointParts.stored`."""
        for at, (layer, rows) in enumerate(rows_of(self.layers)):
            kept = {leaf: getattr(self, f"{leaf}_{at}") for leaf in layer.small}
            kept = {leaf: t.view(DTYPES[layer.entries[leaf].dtype]) for leaf, t in kept.items()}
            kept = {leaf: t.reshape(layer.entries[leaf].shape) for leaf, t in kept.items()}
            tensors = fp8_tensors(layer, self.weight.detach()[rows], kept, self.loaded_as)
            yield from ((layer.name(leaf), tensor) for leaf, tensor in tensors.items())

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """See `StoredParts.dense`."""
        return plain_linear(self.weight.detach().to(dtype), self.bias)


def rows_of(layers: Sequence[Layer]) -> Iterator[tuple[Layer, slice]]:
    """Each layer, and which rows are its."""
    start = 0
    for layer in layers:
        yield layer, slice(start, start + layer.n)
        start += layer.n
