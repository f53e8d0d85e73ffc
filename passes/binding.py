"""Packed copies bound to the tensors of a call: what runs is always the weight that was passed in.

Dynamo's guards check a parameter's metadata, not its values or identity, so a compiled graph may be called with another
instance's weights, or with weights that were written to since. A copy is therefore looked up by the identity, address
and version of every leaf it was made from, verified again when one of them changed, and packed again in place.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack, pack_into
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.recognise import Recipe, recognise, verify
from marlin_w4a16.passes.torch_private import versions_of


class NeedsCallBeforeCapture(RuntimeError):
    """A weight was first seen while a CUDA graph was being captured."""


@dataclass(slots=True)
class _Copy:
    """A packed copy and the state of its leaves when it was made."""

    leaves: list[weakref.ref[Tensor]]
    addresses: list[int]
    versions: list[int]
    packed: PackedFP4

    def holds(self, leaves: Sequence[Tensor]) -> bool:
        """Whether the copy is of these very tensors, unchanged since."""
        return (
            all(ref() is leaf for ref, leaf in zip(self.leaves, leaves, strict=True))
            and [leaf.data_ptr() for leaf in leaves] == self.addresses
            and versions_of(leaves) == self.versions
        )


class Binding:
    """The packed copies of one weight of a graph, one for each set of leaves it was called with.

    Args:
        evaluate: computes the traced weight ``[n, k]`` from its leaves.
        recipe: how the leaves of compile time hold it.
        dtype: what the product is computed in.
        name: what messages call the weight.
    """

    def __init__(
        self, evaluate: Callable[[Sequence[Tensor]], Tensor], recipe: Recipe, dtype: torch.dtype, name: str
    ) -> None:
        self._evaluate = evaluate
        self._recipe = recipe
        self._dtype = dtype
        self.name = name
        self._copies: dict[tuple[int, ...], _Copy] = {}
        self._last: _Copy | None = None
        self._lock = threading.Lock()

    def packed(self, leaves: Sequence[Tensor]) -> PackedFP4 | Rejected:
        """The packed copy of the weight that these leaves hold now.

        Raises:
            NeedsCallBeforeCapture: it would have to be packed while a CUDA graph is captured.
        """
        last = self._last
        if last is not None and last.holds(leaves):
            return last.packed
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._find(leaves)

    def adopt(self, leaves: Sequence[Tensor]) -> PackedFP4 | Rejected:
        """Packs the weight of leaves that the recipe has just been proved on."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._pack(leaves, fit(self._recipe.read(leaves, self.name), self._dtype))

    def _find(self, leaves: Sequence[Tensor]) -> PackedFP4 | Rejected:
        copy = self._copies.get(tuple(map(id, leaves)))
        if copy is not None and copy.holds(leaves):
            self._last = copy
            return copy.packed
        if any(leaf.is_cuda for leaf in leaves) and torch.cuda.is_current_stream_capturing():
            raise NeedsCallBeforeCapture(
                f"{self.name}: this weight is new or has changed, and a CUDA graph is being captured: "
                "call the compiled function once before capture"
            )
        return self._pack(leaves, self._weight(leaves))

    def _pack(self, leaves: Sequence[Tensor], weight: FP4Weight | Rejected) -> PackedFP4 | Rejected:
        if isinstance(weight, Rejected):
            return weight
        key = tuple(map(id, leaves))
        copy = self._copies.get(key)
        if copy is not None and all(ref() is leaf for ref, leaf in zip(copy.leaves, leaves, strict=True)):
            packed = _pack_over(weight, copy.packed)
        else:
            packed = pack(weight)
        self._copies[key] = self._last = _Copy(
            [weakref.ref(leaf, self._forget(key)) for leaf in leaves],
            [leaf.data_ptr() for leaf in leaves],
            versions_of(leaves),
            packed,
        )
        return packed

    def _weight(self, leaves: Sequence[Tensor]) -> FP4Weight | Rejected:
        value = computed(self._evaluate, leaves)
        if isinstance(value, Rejected):
            return value
        weight = verify(self._recipe, value, leaves, self.name)
        if isinstance(weight, Rejected):
            recipe = recognise(value, leaves, self.name)
            if isinstance(recipe, Rejected):
                return recipe
            if (recipe.kind, recipe.group) != (self._recipe.kind, self._recipe.group):
                return Rejected(f"now {recipe.format}, compiled for {self._recipe.format}")
            weight = recipe.read(leaves, self.name)
        return fit(weight, self._dtype)

    def _forget(self, key: tuple[int, ...]) -> Callable[[object], None]:
        owner = weakref.ref(self)

        def forget(_: object) -> None:
            binding = owner()
            if binding is not None:
                gone = binding._copies.pop(key, None)
                if binding._last is gone:
                    binding._last = None

        return forget


def computed(evaluate: Callable[[Sequence[Tensor]], Tensor], leaves: Sequence[Tensor]) -> Tensor | Rejected:
    """The traced weight, or what the model's own operations raise: the graph then runs as it was traced."""
    try:
        return evaluate(leaves)
    except Exception as error:
        return Rejected(f"its traced operations raise {type(error).__name__}: {error}")


def fit(weight: FP4Weight, dtype: torch.dtype) -> FP4Weight | Rejected:
    """The weight with scales that every 16-bit dtype holds, else that ``dtype`` holds, else why not."""
    reason = ""
    for target in (torch.float16, dtype):
        try:
            return weight.fit(target)
        except ValueError as error:
            reason = str(error)
    return Rejected(reason)


def _pack_over(weight: FP4Weight, packed: PackedFP4) -> PackedFP4:
    if weight.codes.device != packed.words.device:
        return pack(weight)
    pack_into(weight, packed)
    return packed
