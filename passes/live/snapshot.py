"""The tensors of a call at one moment: which they are, where they lie, how often they were written to."""

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from marlin_w4a16.passes.graph.torch_private import inner_tensors, is_wrapper, storage_of, versions_of

T = TypeVar("T")
State = tuple[list[int], list[int]]


def state_of(tensors: Sequence[Tensor]) -> State:
    """Address and version of each tensor, read as fast as Python can: it is read at every call."""
    return list(map(Tensor.data_ptr, tensors)), versions_of(tensors)


def watched(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, those that hold the data of wrapper subclasses in the place of these, and at last the wrappers.

    A wrapper's own address says nothing, and what is written to it does not count up its parts' versions; what is
    written to a part does not count up the wrapper's.
    """
    return [*(part for t in tensors for part in inner_tensors(t)), *filter(is_wrapper, tensors)]


def callback(owner: T, act: Callable[[T], object]) -> Callable[[object], None]:
    """What to call when something dies: it acts on an owner, which it does not keep alive, if that is still there."""
    ref = weakref.ref(owner)

    def call(_: object) -> None:
        alive = ref()
        if alive is not None:
            act(alive)

    return call


class Snapshot:
    """What tensors were at one moment, without keeping them alive.

    It ends when one of them dies or gives up its memory: an address may come back as another's.

    Args:
        tensors: the tensors, wrapper subclasses last (see `watched`).
        state: their `state_of`, read before anything else is.
        on_death: called, with a weak reference, when one of them dies.
    """

    __slots__ = ("__weakref__", "_state", "_storages", "_tensors")

    def __init__(
        self, tensors: Sequence[Tensor], state: State, on_death: Callable[[object], None] | None = None
    ) -> None:
        self._state: State | None = state
        end = callback(self, lambda snapshot: setattr(snapshot, "_state", None))
        plain = [tensor for tensor in tensors if not is_wrapper(tensor)]  # swap_tensors, and so .to(), wants no
        self._tensors = [weakref.ref(tensor, on_death) for tensor in plain]  # weak reference to a wrapper
        self._storages = [weakref.ref(s, end) for s in map(storage_of, plain) if s is not None]

    def holds(self, tensors: Sequence[Tensor], state: State) -> bool:
        """Whether these are the same tensors, unchanged; ``state`` is their `state_of`.

        Identity is compared by ``is``: where an audit hook is installed, ``id`` takes ten times as long.
        """
        return self._state == state and all(map(operator.is_, [ref() for ref in self._tensors], tensors))
