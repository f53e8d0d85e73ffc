"""The computation of one weight of a graph: what it reads, what it does, and its values on live tensors."""

import functools
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.passes.find.equation import Matrices
from marlin_w4a16.passes.graph.constants import Constants, needed_by, slice_of
from marlin_w4a16.passes.graph.nodes import closure, each_value, example, literals, storage, value_of
from marlin_w4a16.passes.graph.purity import written_by
from marlin_w4a16.passes.judge.joins import JOINS, flat, is_cast, is_transpose, joined
from marlin_w4a16.passes.judge.tensors import dense

_DEEPEST = 8  # concatenations of concatenations; those further in are taken as one


@dataclass(frozen=True, slots=True)
class Window:
    """Rows of a larger weight: from ``start`` every ``step``-th one, of ``total``."""

    start: int
    total: int
    step: int = 1

    def rows(self, count: int) -> slice:
        """So many of them."""
        return slice(self.start, self.start + self.step * count, self.step)

    def at(self, rows: list[int]) -> list[int]:
        """Where some rows lie in the larger weight."""
        return [self.start + self.step * row for row in rows]


@dataclass(eq=False)
class Decode:
    """What makes a weight.

    Attributes:
        value: the node of the traced weight.
        nodes: what computes it, in graph order: leaves, operations and in-place writes.
        leaves: those of the nodes that hold weights.
        matrices: how the product sees it.
        constants: those of the graph.
        lift: the axis along which it was stacked, if it is a part of a stack.
        depth: of how many joined values it is a part.
        shared: while weights are judged one after the other, the value of the `base` that the last of them had.
    """

    value: fx.Node
    nodes: list[fx.Node]
    leaves: list[fx.Node]
    matrices: Matrices
    constants: Constants
    lift: int | None = None
    depth: int = 0
    shared: dict[fx.Node, Tensor] | None = None
    _slices: dict[int, list[fx.Node]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        value: fx.Node,
        user: fx.Node,
        matrices: Matrices,
        constants: Constants,
        lift: int | None = None,
        depth: int = 0,
    ) -> "Decode":
        """What makes a weight that ``user`` reads."""
        nodes = slice_of(value, user, constants)
        leaves = [node for node in nodes if node in constants.leaves]
        return cls(value, nodes, leaves, matrices, constants, lift, depth)

    @property
    def rows(self) -> int:
        """Rows of all its matrices."""
        return self.matrices.batch * self.matrices.n

    def traced(self, leaves: Sequence[Tensor]) -> Tensor:
        """The value that the product reads, from the values of its leaves."""
        nodes, known = self.nodes, dict(zip(self.leaves, leaves, strict=True))
        if self.base is not None and self.shared is not None:
            if self.base not in self.shared:
                self.shared.clear()
                self.shared[self.base] = value_of(self.base, self._slice(self._place[self.base]), known)
            nodes, known = self._after_base, known | self.shared
        value: Tensor = value_of(self.value, nodes, known)
        return value

    def weight(self, leaves: Sequence[Tensor]) -> Tensor:
        """The traced weight as ``[rows, k]``, plain."""
        value = dense(self.traced(leaves))
        return self.matrices(value if self.lift is None else value.unsqueeze(self.lift))

    def source(self, index: int, leaves: Sequence[Tensor]) -> Tensor:
        """The value of one of the nodes once nothing writes to it any more."""
        node, known = self.nodes[index], dict(zip(self.leaves, leaves, strict=True))
        return known[node] if node in known else value_of(node, self._slice(index), known)

    def sources(self, indices: Collection[int], leaves: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Nodes that are no leaves, and their values, each once nothing writes to it any more; others are let go.

        All that they need runs once.
        """
        wanted = {self.nodes[index] for index in indices}
        nodes, held = self._needed(wanted), dict[fx.Node, Tensor]()
        last_write = {storage(target): node for node in nodes for target in written_by(node)}
        due: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in wanted:
            due[max(node, last_write.get(storage(node), node))].append(node)
        for node, value in each_value(nodes, dict(zip(self.leaves, leaves, strict=True))):
            if node in wanted:
                held[node] = value
            for settled in due.pop(node, ()):
                yield self._place[settled], held.pop(settled)

    def roots(self, index: int) -> list[int]:
        """The leaves, by their positions, that a node is computed from."""
        return self.places([node for node in self._slice(index) if node in self.constants.leaves])

    def places(self, leaves: Sequence[fx.Node]) -> list[int]:
        """The positions of some of the leaves."""
        return [self._leaf_place[leaf] for leaf in leaves]

    def expression(self, index: int) -> tuple[Any, ...]:
        """What a node computes from its `roots`."""
        return _signature(self.nodes[index], self._slice(index))

    @functools.cached_property
    def signature(self) -> tuple[Any, ...]:
        """What it computes, whatever its nodes are called: decodes of one signature and one set of leaves agree."""
        layouts = tuple((str(t.dtype), t.device, t.shape, t.stride()) for t in map(example, self.leaves))
        return (self.matrices, self.lift, layouts, *_signature(self.value, self.nodes))

    @functools.cached_property
    def tensors(self) -> list[tuple[int, Tensor]]:
        """Its nodes that are tensors, by position, and their example values: leaves first.

        Those that only show the bytes of another once more are left out.
        """
        seen: set[Any] = set()
        found = []
        for index in sorted(range(len(self.nodes)), key=lambda index: index not in self.leaf_indices):
            node, value = self.nodes[index], example(self.nodes[index])
            if not isinstance(value, Tensor):
                continue
            order = None if value.is_contiguous() else index
            shown = (order, value.storage_offset(), value.numel(), value.dtype, storage(node))
            if shown not in seen or storage(node) is None:
                seen.add(shown)
                found.append((index, value))
        return found

    @functools.cached_property
    def leaf_indices(self) -> frozenset[int]:
        """The positions of the leaves among the nodes."""
        return frozenset(self._place[leaf] for leaf in self.leaves)

    @functools.cached_property
    def by_size(self) -> dict[int, list[tuple[int, Tensor]]]:
        """Its `tensors`, by how many elements they have."""
        found: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)
        for index, value in self.tensors:
            found[value.numel()].append((index, value))
        return dict(found)

    @functools.cached_property
    def numbers(self) -> list[float]:
        """The floats that stand in its operations as they are."""
        floats = (value for value in literals(self.nodes) if isinstance(value, float))
        return list(dict.fromkeys(value for value in floats if 0 < abs(value) < float("inf")))

    @functools.cached_property
    def windows(self) -> list[Window]:
        """Where its rows may lie: they are all, or some of a larger value that the traced weight is a view of."""
        found = {Window(0, self.rows): None}
        node, order, seen = self.value, self.matrices.order, set[Any]()
        while True:
            part = example(node)
            layout = storage(node), part.storage_offset(), part.stride()
            for base in self._views[storage(node)] if layout not in seen else ():
                whole = example(base)
                total, rest = divmod(whole.numel(), self.matrices.k)
                if rest or total <= self.rows or not whole.is_contiguous():
                    continue
                offset = part.storage_offset() - whole.storage_offset()
                by_rows = part.ndim == len(order) == 2 and part.stride(order[1]) == 1
                step = part.stride(order[0]) // self.matrices.k if by_rows else 1
                for window in (Window(offset, total), Window(offset // self.matrices.k, total, max(1, step))):
                    last = window.start + window.step * (self.rows - 1)
                    if window.start >= 0 and last < total:
                        found[window] = None
            seen.add(layout)
            if not is_cast(node):
                return list(found)
            node = node.all_input_nodes[0]

    @functools.cached_property
    def base(self) -> fx.Node | None:
        """The last larger value that the weight is a view of, or a cast view: others may be parts of it too."""
        node = self.value
        while is_cast(node):
            node = node.all_input_nodes[0]
        views = (n for n in self._views[storage(node)] if n not in self.constants.leaves)
        last = max((n for n in views if example(n).numel() > example(node).numel()), default=None)
        return None if last is None or any(map(written_by, self.nodes[self._place[last] + 1 :])) else last

    @functools.cached_property
    def _after_base(self) -> list[fx.Node]:
        return sorted(closure([self.value], lambda node: [] if node is self.base else node.all_input_nodes))

    @functools.cached_property
    def parts(self) -> tuple[int, list["Decode"]]:
        """The values it is made of, if it is a concatenation or a stack: below (axis 0) or beside each other (1)."""
        node, turned = self.value, False
        while is_cast(node) or is_transpose(node):
            turned ^= is_transpose(node)
            node = node.all_input_nodes[0]
        if node.target not in JOINS or self.lift is not None or self.matrices.first or example(node).ndim < 2:
            return 0, []
        tensors, lift = joined(node)
        place = self.matrices.order.index(example(node).ndim - 1 - lift if turned else lift)
        stacks = node.target is torch.stack
        if self.depth == _DEEPEST and not stacks:
            tensors = flat(tensors, lift)
        if place not in (0, len(self.matrices.sizes)) or not all(isinstance(tensor, fx.Node) for tensor in tensors):
            return 0, []
        axis = 0 if place == 0 else 1
        seen = [example(t).unsqueeze(lift) if stacks else example(t) for t in tensors]
        return axis, [
            Decode.of(t, node, self._part(value, turned), self.constants, lift if stacks else None, self.depth + 1)
            for t, value in zip(tensors, seen, strict=True)
        ]

    @functools.cached_property
    def _place(self) -> dict[fx.Node, int]:
        return {node: place for place, node in enumerate(self.nodes)}

    @functools.cached_property
    def _leaf_place(self) -> dict[fx.Node, int]:
        return {leaf: place for place, leaf in enumerate(self.leaves)}

    @functools.cached_property
    def _views(self) -> dict[Hashable | None, list[fx.Node]]:
        """The tensors among its nodes, by their storages."""
        views: dict[Hashable | None, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            if isinstance(example(node), Tensor):
                views[storage(node)].append(node)
        return views

    def _needed(self, nodes: Collection[fx.Node]) -> list[fx.Node]:
        needed = needed_by(nodes, self.constants)
        return sorted(needed.intersection(self._place), key=self._place.__getitem__)

    def _part(self, value: Tensor, turned: bool) -> Matrices:
        order = tuple(value.ndim - 1 - axis for axis in self.matrices.order) if turned else self.matrices.order
        outer = len(self.matrices.sizes)
        sizes = tuple(value.shape[axis] for axis in order[:outer])
        k = torch.Size([value.shape[axis] for axis in order[outer:]]).numel()
        return Matrices((), order, 1, torch.Size(sizes).numel(), k, sizes)

    def _slice(self, index: int) -> list[fx.Node]:
        if index not in self._slices:
            self._slices[index] = self._needed([self.nodes[index]])
        return self._slices[index]


def _signature(value: fx.Node, nodes: list[fx.Node]) -> tuple[Any, ...]:
    index = {node: i for i, node in enumerate(nodes)}

    def shown(node: fx.Node) -> str:
        return f"%{index[node]}"

    def told(node: fx.Node) -> tuple[str, ...]:
        if node.op == "placeholder":
            return (node.op,)
        computed = node.op, str(node.target), repr(fx.map_arg((node.args, node.kwargs), shown))
        return *computed, repr(node.meta.get("autocast"))

    return index[value], *map(told, nodes)
