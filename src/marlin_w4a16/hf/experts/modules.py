"""Experts of a checkpoint: what holds their place while a model is loaded, and what runs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.checkpoints.experts import Stack, alike, read_weights, some_at_a_time
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.checkpoints.storage import DTYPES
from marlin_w4a16.hf.dense import decoded, joined
from marlin_w4a16.hf.experts.batched import Llama4Experts
from marlin_w4a16.hf.experts.gather import Gathered
from marlin_w4a16.kernels.experts import fit_each, pack_each, pack_first, unpack_first
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.modules.batched_experts import BatchedExperts
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.state import PackedState
from marlin_w4a16.modules.transformers_experts import biases_of, names_of


class StoredExperts(nn.Module):
    """Stands for an Experts module while transformers loads all else; its biases are loaded by their own names.

    Args:
        found: what the checkpoint holds, and what the module computes with it.
        experts: the module, without values.
        dtype: of the model.
    """

    def __init__(self, found: Gathered, experts: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.mixture, self.activation, self.order, self.dtype = found.mixture, found.activation, found.order, dtype
        self.like = (experts,)  # a tuple: its weights are none of the model's
        for name in names_of(experts):
            self.register_parameter(f"{name}_bias", experts._parameters.get(f"{name}_bias"))

    def loaded(self, reader: Reader) -> "CheckpointExperts":
        """The experts that run, read and packed some at a time."""
        runs = CheckpointBatchedExperts if isinstance(self.like[0], Llama4Experts) else CheckpointExperts
        return runs(self, reader).train(self.training)

    def dense(self, reader: Reader, dtype: torch.dtype) -> nn.Module:
        """The module of transformers with the exact weights rounded once to ``dtype``."""

        def weight(stacks: tuple[Stack, ...], expert: int) -> FP4Weight:
            return joined([stack.weight(stack.read(expert, reader)) for stack in stacks])

        products = partial(weight, self.mixture.first), partial(weight, (self.mixture.second,))
        biases = {name: bias for name, bias in self._parameters.items() if bias is not None}
        return dense_experts(self.like[0], products, biases, dtype).train(self.training)

    def forward(self, *_: Any) -> Tensor:
        """Never called: experts are loaded before a model runs."""
        raise RuntimeError(f"{self.mixture.path}: found experts that are not loaded yet, expected a loaded model")


class CheckpointExperts(PackedExperts):
    """`PackedExperts` that can give back the tensors of their checkpoint, bit for bit.

    Beside the packed weights they keep the checkpoint's small tensors (global scales, input scales) as bytes, which
    casts leave alone.

    Args:
        stored: what they take the place of; its biases have been loaded.
        reader: reads to the device on which weights are packed, and stay.
    """

    def __init__(self, stored: StoredExperts, reader: Reader) -> None:
        PackedState.__init__(self)
        mixture, order = stored.mixture, stored.order
        self.mixture, self.like, self._unfitted = mixture, stored.like, dict[tuple[str, int], tuple[Tensor, Tensor]]()
        count, width = mixture.second.experts, mixture.second.like.k
        small = {stack.name: stack.small(reader) for stack in mixture.stacks}
        for stack in mixture.stacks:
            for leaf, of_all in small[stack.name].items():
                kept = of_all.reshape(count, -1).view(torch.uint8)
                self.register_bits(_kept(stack, leaf), kept, persistent=False)

        def read(*stacks: Stack) -> Iterator[FP4Weight]:
            together = [stacks] if alike(stacks) else [(stack,) for stack in stacks]
            for experts in some_at_a_time(*stacks):
                yield joined([self._read(some, experts, small, reader, stored.dtype) for some in together])

        w13 = pack_first(read(*mixture.first), count, width, order)
        w2 = pack_each(read(mixture.second), count)
        biases = [getattr(stored, f"{name}_bias") for name in names_of(self.like[0])]
        self._hold((w13, w2), stored.activation, order, mixture.rows, biases, stored.dtype)

    def _read(
        self,
        stacks: Sequence[Stack],
        experts: range,
        small: Mapping[str, Mapping[str, Tensor]],
        reader: Reader,
        dtype: torch.dtype,
    ) -> FP4Weight:
        """See `read_weights`: as they are packed, the rows of all stacks below each other.

        The scales that changes (see `FP4Weight.fit`) are kept as they were.
        """
        weight = read_weights(stacks, experts, small, reader)
        fitted = fit_each(weight, torch.float16, dtype)
        if fitted is not weight:
            matrix, row = (fitted.scales != weight.scales).any(-1).nonzero(as_tuple=True)
            scales, matrix, row = weight.scales[matrix, row].cpu(), matrix.cpu(), row.cpu()
            for one in matrix.unique().tolist():
                expert, stack = divmod(one, len(stacks))
                self._unfitted[stacks[stack].name, experts[expert]] = row[matrix == one], scales[matrix == one]
        tensors = (fitted.codes, fitted.scales, fitted.multiplier)
        return fitted.derived(*(t.reshape(len(experts), -1, *t.shape[2:]) for t in tensors))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `PackedExperts.forward`; experts that a device map put on the CPU come over for the call."""
        device, held = hidden_states.device, self.w13.words.device
        if device == held:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        if held.type == "cpu":
            weights = self.w13.to(device), self.w2.to(device)
            bias13, bias2 = (None if bias is None else bias.to(device) for bias in (self.bias13, self.bias2))
            out = self._run(hidden_states, top_k_index, top_k_weights, weights, (bias13, bias2))
        else:
            inputs = (tensor.to(held) for tensor in (hidden_states, top_k_index, top_k_weights))
            out = super().forward(*inputs).to(device)
        return out

    def stored(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors by name, bit for bit, on the CPU, without the biases.

        Raises:
            CheckpointError: a weight was changed since it was loaded, so that its global scale does not belong to it.
        """
        start = 0
        for stack in self.mixture.first:
            rows = slice(start, start := start + stack.like.n)
            yield from stack.named(self._stored(stack, self._first(e, rows), e) for e in range(self.num_experts))
        second = self.mixture.second
        yield from second.named(self._stored(second, self._second(e), e) for e in range(self.num_experts))

    def biases(self) -> dict[str, nn.Parameter]:
        """The biases by their names in the module of transformers, in its order."""
        return biases_of(self, self.like[0])

    def dense(self, dtype: torch.dtype) -> nn.Module:
        """See `StoredExperts.dense`."""
        return dense_experts(self.like[0], (self._first, self._second), self.biases(), dtype).train(self.training)

    def _first(self, expert: int, rows: slice = slice(None)) -> FP4Weight:
        """Rows of the first product of an expert, in the checkpoint's order."""
        name = f"{self.mixture.path}: expert {expert}"
        whole = unpack_first(self.w13.matrix(expert), self.w2.k, self.order, self.intermediate, name)
        return whole.derived(whole.codes[rows], whole.scales[rows], whole.multiplier[rows])

    def _second(self, expert: int) -> FP4Weight:
        return self.w2.matrix(expert).unpack(f"{self.mixture.path}: expert {expert}")

    def _stored(self, stack: Stack, held: FP4Weight, expert: int) -> dict[str, Tensor]:
        layer, small = stack.of(expert), dict[str, Tensor]()
        for leaf in layer.small:
            kept, entry = getattr(self, _kept(stack, leaf))[expert], layer.entries[leaf]
            of_each = layer.experts and entry.shape[:1] == (layer.experts,)
            small[leaf] = kept.view(DTYPES[entry.dtype]).reshape(entry.shape[1:] if of_each else entry.shape)
        return layer.fp4.restore(held, self._unfitted.get((stack.name, expert)), small, layer.entries, layer.path)


class CheckpointBatchedExperts(BatchedExperts, CheckpointExperts):  # type: ignore[misc]  # their forwards differ
    """`CheckpointExperts` that are given rows in equal parts: those of Llama 4."""


def dense_experts(
    experts: Any, products: tuple[Callable[[int], FP4Weight], ...], biases: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """A copy of an Experts module that holds no values, with dense weights, written expert by expert.

    ``products`` give the first and the second weight of an expert by its number.
    """
    made: Any = copy.deepcopy(experts)
    for name, product in zip(names_of(experts), products, strict=True):
        shape = made._parameters[name].shape
        for expert in range(shape[0]):
            matrix = decoded(product(expert), dtype)
            matrix = matrix.T if experts.is_transposed else matrix
            if not expert:
                made._parameters[name] = nn.Parameter(matrix.new_empty(shape))
            # columns of the second product may be filled up to whole groups
            made._parameters[name].data[expert] = matrix[: shape[1], : shape[2]]
    for name, bias in biases.items():
        made._parameters[name] = nn.Parameter(bias.detach().to(dtype), bias.requires_grad)
    plain: nn.Module = made.original[0] if isinstance(made, Llama4Experts) else made
    return plain


def _kept(stack: Stack, leaf: str) -> str:
    return f"{stack.name}_{leaf}"
