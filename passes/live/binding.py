"""Packed copies bound to the tensors of a call: what runs is always the weight that was passed in.

Dynamo's guards check a parameter's metadata, not its values or identity, so a compiled graph may be called with another
instance's weights, or with weights that were written to since. A copy is therefore looked up by the identity, address,
version and layout of every leaf of the weight; when one of them changed, the weight is verified again and packed in
place.
"""

import threading
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.fp4 import FP4Weight, format_name
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import compute_dtype
from marlin_w4a16.passes.judge.decode import Decode
from marlin_w4a16.passes.judge.ranges import out_of_range
from marlin_w4a16.passes.judge.search import recognise
from marlin_w4a16.passes.judge.verdict import Found, judge_again
from marlin_w4a16.passes.judge.weights import Weight
from marlin_w4a16.passes.live.snapshot import Snapshot, State, callback, deaths, laid_out_state_of, watched
from marlin_w4a16.passes.mixture.stacks import pack_stack
from marlin_w4a16.passes.outcome import Rejected, raised
from marlin_w4a16.passes.settings import Rules


class NeedsCallBeforeCapture(RuntimeError):
    """A weight was first seen while a CUDA graph was being captured."""


@dataclass(eq=False)
class _Copy:
    """A packed weight and the tensors it was read from at that moment.

    ``users`` are the snapshots of those who were given it: they end when it is packed over, since their tensors may
    come back unchanged (``old = p.data; p.data = new; ...; p.data = old``).
    """

    packed: PackedFP4
    sources: Snapshot
    users: weakref.WeakSet[Snapshot] = field(default_factory=weakref.WeakSet)

    def end(self) -> None:
        """Ends what was known of it."""
        for snapshot in (self.sources, *self.users):
            snapshot.end()
        self.users.clear()


# The graphs of a model (prefill and decode, static and dynamic shapes) read the same weights: they share the copies.
# A copy lives as long as some binding holds it.
_COPIES: MutableMapping[tuple[Any, ...], _Copy] = weakref.WeakValueDictionary()
_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Verified:
    """That the traced operations gave, at one moment, the weight of a copy, or none."""

    leaves: Snapshot
    copy: _Copy | Rejected


class Binding:
    """The packed copies of one weight of a graph, one for each set of leaves it was called with.

    Args:
        decode: computes the traced weight from its leaves.
        found: how the leaves of compile time hold it.
        rules: what is accepted.
        dtype: what the product is computed in.
        name: what messages call the weight.
        order: of the gates and ups among the rows of experts that are packed in pairs.
    """

    def __init__(
        self, decode: Decode, found: Found, rules: Rules, dtype: torch.dtype, name: str, order: Order | None = None
    ) -> None:
        self._decode = decode
        self._recipe, self._roundings = found.recipe, found.roundings
        self._rules, self._dtype, self._order, self.name = rules, dtype, order, name
        self._verified: dict[tuple[int, ...], _Verified] = {}  # die with any leaf, a table say
        self._held: dict[tuple[int, ...], tuple[Any, ...]] = {}  # copies; they die with what the weight is read from

    def packed(self, leaves: Sequence[Tensor], user: Snapshot | None = None) -> PackedFP4 | Rejected:
        """The packed copy of the weight that these leaves hold now: a stack if it has several matrices.

        Args:
            leaves: the tensors of this call.
            user: ended when the copy is packed over.

        Raises:
            NeedsCallBeforeCapture: it would have to be packed while a CUDA graph is captured.
        """
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            tensors = watched(leaves)
            state = laid_out_state_of(tensors)
            verified = self._verified.get(tuple(map(id, leaves)))
            if verified is not None and verified.leaves.holds(state):
                copy = verified.copy
            elif any(leaf.is_cuda for leaf in leaves) and torch.cuda.is_current_stream_capturing():
                raise NeedsCallBeforeCapture(
                    f"{self.name}: this weight is new or has changed, and a CUDA graph is being captured: "
                    "call the compiled function once before capture"
                )
            else:
                copy = self._bind(leaves, tensors, state, self._weight(leaves))
            if isinstance(copy, Rejected):
                return copy
            if user is not None:
                copy.users.add(user)
            return copy.packed

    def adopt(self, leaves: Sequence[Tensor], weight: FP4Weight) -> PackedFP4 | Rejected:
        """Packs the weight that these leaves have just been found to hold."""
        with _LOCK, torch.inference_mode(False), torch.no_grad():
            tensors = watched(leaves)
            copy = self._bind(leaves, tensors, laid_out_state_of(tensors), weight)
            return copy if isinstance(copy, Rejected) else copy.packed

    def _bind(
        self, leaves: Sequence[Tensor], tensors: list[Tensor], state: State, weight: FP4Weight | Rejected
    ) -> _Copy | Rejected:
        copy, ids = weight if isinstance(weight, Rejected) else self._copy(leaves, weight), tuple(map(id, leaves))
        before, at = self._verified.get(ids), Snapshot(tensors, state, self._forget(ids))
        self._verified[ids] = _Verified(at, copy)
        if before is None or not before.leaves.held(state):  # else others ended it, and would do so in turn
            at.end_others()
        if isinstance(copy, _Copy):
            copy.users.add(at)
        return copy

    def _copy(self, leaves: Sequence[Tensor], weight: FP4Weight) -> _Copy | Rejected:
        roots = [leaves[i] for i in self._recipe.roots(self._decode)]
        ids, sources = tuple(map(id, roots)), watched(roots)
        state, reading = laid_out_state_of(sources), self._recipe.reading(self._decode)
        batch, order, codes = self._decode.matrices.batch, self._order, weight.codes
        how = codes.device, codes.shape, weight.kind, weight.group, reading, batch, order, self._dtype is torch.float16
        key = (*ids, *how)
        copy = _COPIES.get(key)
        if copy is None or not copy.sources.holds(state):
            fitted = fit(weight, self._dtype)
            if isinstance(fitted, Rejected):
                return fitted
            if copy is None:
                copy = _COPIES[key] = _Copy(pack_stack(fitted, batch, order), Snapshot(sources, state))
            else:
                copy.end()
                pack_stack(fitted, batch, order, copy.packed)
                copy.sources = Snapshot(sources, state)
        self._held[ids] = copy, *deaths(sources, self._forget(ids))
        return copy

    def _weight(self, leaves: Sequence[Tensor]) -> FP4Weight | Rejected:
        try:
            found = judge_again(self._recipe, self._roundings, self._decode, leaves, self.name, self._rules)
            if isinstance(found, Rejected):
                found = recognise(self._decode, leaves, self.name, self._rules)
        except Exception as error:
            return raised(error)
        if isinstance(found, Rejected):
            return found
        if (found.recipe.kind, found.recipe.group) != (self._recipe.kind, self._recipe.group):
            return Rejected(f"now {found.format}, compiled for {format_name(self._recipe.kind, self._recipe.group)}")
        self._recipe, self._roundings = found.recipe, found.roundings
        return out_of_range(found.weight, self._dtype, self._rules.tolerance) or found.weight

    def _forget(self, ids: tuple[int, ...]) -> Callable[[object], None]:
        return callback(self, lambda binding: (binding._verified.pop(ids, None), binding._held.pop(ids, None)))


class Copies:
    """Bindings of weights that were found to be FP4, each with its packed copy, made when first asked for."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._held: dict[tuple[Weight, Order | None], tuple[Binding, PackedFP4]] = {}

    def bound(self, weight: Weight, found: Found, order: Order | None) -> tuple[Binding, PackedFP4]:
        """The binding of a weight and its packed copy, the rows of experts in pairs if there is an order."""
        if (weight, order) not in self._held:
            dtype = compute_dtype(weight.products)
            binding = Binding(weight.decode, found, self._rules, dtype, weight.path, order)
            copy = binding.adopt(weight.values, found.weight)
            assert isinstance(copy, PackedFP4)  # what was found has been fitted to the dtype
            self._held[weight, order] = binding, copy
        return self._held[weight, order]

    def packed(self, weight: Weight, found: Found, order: Order | None) -> PackedFP4:
        """The packed copy alone."""
        return self.bound(weight, found, order)[1]


def fit(weight: FP4Weight, dtype: torch.dtype) -> FP4Weight | Rejected:
    """The weight with scales that every 16-bit dtype holds, else that ``dtype`` holds, else why not."""
    try:
        return weight.fit_first(torch.float16, dtype)
    except ValueError as error:
        return Rejected(str(error).removeprefix(f"{weight.name}: "))
