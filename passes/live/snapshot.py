"""The tensors of a call at one moment: which they are, where they lie, how often they were written to."""

import ctypes
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from marlin_w4a16.passes.graph.torch_private import inner_tensors, is_wrapper, storage_of, versions_of

T = TypeVar("T")
State = tuple[Any, ...]
_MARK = "_marlin_w4a16_mark"


class Mark:
    """Which tensor one is: lies among its attributes, as Dynamo's marks do, and dies with it.

    A weak reference to the tensor would keep `torch.utils.swap_tensors` from swapping it; a mark goes with the values.
    What is copied or saved with a tensor is an empty set in the place of it, which is no mark.

    Attributes:
        key: equal to itself only. Who holds it keeps neither the mark nor the tensor alive, and it never comes back.
        of: the id of the tensor that has the key.
    """

    __slots__ = ("__weakref__", "key", "of")

    def __init__(self, of: int) -> None:
        self.key, self.of = object(), of

    def __reduce__(self) -> tuple[Any, ...]:
        return set, ()


def state_of(tensors: Sequence[Tensor]) -> State:
    """Identity, mark, address and version of each tensor, read as fast as Python can: it is read at every call.

    Neither mark nor identity alone says which tensor one is: shallow copies share a mark, and objects may be swapped.
    """
    try:
        keys = [t._marlin_w4a16_mark.key for t in tensors]  # type: ignore[attr-defined]
    except AttributeError:
        keys = [_mark(t).key for t in tensors]
    return _identities(tuple(tensors)), keys, list(map(Tensor.data_ptr, tensors)), versions_of(tensors)


def laid_out_state_of(tensors: Sequence[Tensor]) -> State:
    """The same with shapes, strides and dtypes, of tensors that have marks of their own."""
    mark(tensors)
    return *state_of(tensors), [(t.shape, t.stride(), t.dtype) for t in tensors]


def mark(tensors: Iterable[Tensor]) -> None:
    """Gives each tensor a mark of its own, before a state is read that is to be held against later ones."""
    for tensor in tensors:
        _mark(tensor)


def _identities(objects: tuple[object, ...]) -> bytes:
    """The ids of objects, which CPython's tuples are arrays of; `id` may cost 0.15 us each (see docs/design.md)."""
    return ctypes.string_at(id(objects) + tuple.__basicsize__, len(objects) * tuple.__itemsize__)


def _mark(tensor: Tensor) -> Mark:
    """The mark of a tensor; a new one if it has none, or `copy.copy` gave its own to another tensor.

    What was another tensor's, of one that it was swapped with or a copy of one that died, gets another key.
    """
    attributes = vars(tensor)
    if not isinstance(attributes.get(_MARK), Mark) or _references(attributes) > _ALONE:
        attributes[_MARK] = Mark(id(tensor))
    mark = cast(Mark, attributes[_MARK])
    if mark.of != id(tensor):
        Mark.__init__(mark, id(tensor))
    return mark


def _references(attributes: dict[str, Any]) -> int:
    """References to the mark among attributes, and those that counting makes, which differ between releases."""
    return sys.getrefcount(attributes[_MARK])


_ALONE = _references({_MARK: Mark(0)})


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


def deaths(tensors: Iterable[Tensor], call: Callable[[object], None]) -> list[object]:
    """As long as this is held, ``call`` is called, with something, when one of the tensors dies."""
    return [weakref.ref(_mark(tensor), call) for tensor in tensors]


class _Memory(weakref.ref[torch.UntypedStorage]):
    """The storage of a tensor, the key of the mark that counts writes to it, its first byte and the one past its last.

    Found from the storage by `weakref.getweakrefs`, so that nothing lists who looks at it.

    Attributes:
        keys: those of all tensors of its snapshot.
        end: ends the snapshot.
    """

    __slots__ = ("end", "first", "key", "keys", "past")
    end: Callable[[object], None]
    first: int
    key: object
    keys: frozenset[object]
    past: int


def _memory(tensor: Tensor, key: object, keys: frozenset[object], end: Callable[[object], None]) -> _Memory | None:
    storage = storage_of(tensor)
    if storage is None:
        return None
    found, last = _Memory(storage, end), sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    found.key, found.keys, found.end, found.first = key, keys, end, tensor.data_ptr()
    found.past = found.first + (last + 1) * tensor.element_size()
    return found


class Snapshot:
    """What tensors were at one moment, without keeping them alive.

    It ends when one of them gives up its memory, since an address may come back as another's, or when it is ended. One
    that was ended still knows what it held for.

    Args:
        tensors: the tensors (see `watched`).
        state: their `state_of` or `laid_out_state_of`, read before anything else is.
        on_death: called, with something, when one of them dies.
    """

    __slots__ = ("__weakref__", "_deaths", "_keys", "_last", "_memory", "_state")

    def __init__(
        self, tensors: Sequence[Tensor], state: State, on_death: Callable[[object], None] | None = None
    ) -> None:
        self._state: State | None = state
        self._last, self._keys, end = state, frozenset(state[1]), callback(self, Snapshot.end)
        pairs = zip(tensors, state[1], strict=True)  # what is written to a wrapper counts for its parts' memory
        found = (_memory(part, key, self._keys, end) for tensor, key in pairs for part in inner_tensors(tensor))
        self._memory = [memory for memory in found if memory is not None]
        self._deaths = [] if on_death is None else deaths(tensors, on_death)

    def holds(self, state: State) -> bool:
        """Whether a state, read as the first one was, is that of the same tensors, unchanged."""
        return self._state == state

    def held(self, state: State) -> bool:
        """The same, or that it would be, had it not been ended."""
        return self._last == state

    def end_others(self) -> None:
        """Ends those of other tensors that lie where these do: what is written to one is counted by it alone.

        Copies (`copy.copy(p)`, `p.data`) are such tensors, and so are wrappers that hold the same parts.
        """
        for mine in self._memory:
            for other in weakref.getweakrefs(mine()):
                if not isinstance(other, _Memory) or (other.key in self._keys and mine.key in other.keys):
                    continue
                if mine.first < other.past and other.first < mine.past:
                    other.end(other)

    def end(self) -> None:
        """From now on it holds for nothing."""
        self._state = None
