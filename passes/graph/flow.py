"""What each node of a flat graph reads, the in-place writes before it included, and closed parts of the graph."""

import heapq
from collections.abc import Collection, Hashable, Iterable, Iterator

import torch
from torch import Tensor, fx

from marlin_w4a16.passes.graph.constants import Constants, storages
from marlin_w4a16.passes.graph.nodes import closure, example, storage
from marlin_w4a16.passes.graph.purity import written_by

# What makes a tensor of the shape of its first argument, whose values do not matter.
_LIKE = frozenset(
    {torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, "new_empty", "new_zeros", "new_ones",
     "new_full"}
)  # fmt: skip
_CALLS = ("call_function", "call_method")
_MOST = 192  # nodes of a part; a wrong boundary would lead through all layers before


class Flow:
    """The order of reads and writes in a flat graph; what is written to its constants is not looked at."""

    def __init__(self, graph: fx.Graph, constants: Constants) -> None:
        self.constants = constants
        self._nodes = list(graph.nodes)
        self._place = {node: place for place, node in enumerate(self._nodes)}
        self._keys = {node: storage(node) for node in graph.nodes}
        self._writes: dict[Hashable, list[fx.Node]] = {}
        self._members: dict[Hashable, list[fx.Node]] = {}
        self._reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for node, key in self._keys.items():
            self._members.setdefault(key, []).append(node)
            for target in storages(written_by(node)) if node not in constants else ():
                self._writes.setdefault(target, []).append(node)

    def reads(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What a node needs: the inputs whose values matter to it and what wrote to them before."""
        found = self._reads.get(node)
        if found is None:
            inputs = node.all_input_nodes[1 if node.target in _LIKE else 0 :]
            keys = {self._keys[used] for used in inputs} - {None}
            writes = (write for key in keys for write in self._writes.get(key, ()) if write < node)
            found = self._reads[node] = (*inputs, *writes)
        return found

    def before(self, roots: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> Iterator[fx.Node]:
        """Walks what some nodes are computed from, these included, the latest first; not past ``stop`` or constants.

        It ends after some two hundred nodes.
        """
        seen = {node for node in roots if node not in stop and node not in self.constants}
        todo = [(-self._place[node], node) for node in seen]
        heapq.heapify(todo)
        for _ in range(_MOST):
            if not todo:
                return
            _, node = heapq.heappop(todo)
            yield node
            for used in self.reads(node):
                if used not in seen and used not in stop and used not in self.constants:
                    seen.add(used)
                    heapq.heappush(todo, (-self._place[used], used))

    def part(self, output: fx.Node, given: Collection[fx.Node]) -> list[fx.Node] | None:
        """What computes a node from what is given and constants alone, in graph order, or None.

        Nothing of it writes to what others see; numbers, such as sizes, may enter.
        """
        nodes: set[fx.Node] = set()
        first = min(given)
        for node in self.before([output], given):
            nodes.add(node)
            if isinstance(example(node), Tensor):
                read = (used for used in self.reads(node) if used not in self.constants)
                begins = node < first and any(isinstance(example(used), Tensor) for used in read)
                if begins or node.op not in _CALLS:
                    return None
        if len(nodes) == _MOST:
            return None
        written = {key for node in nodes for key in storages(written_by(node))}
        if None in written or any(member not in nodes for key in written for member in self._members[key]):
            return None
        return sorted(nodes)

    def is_written(self, nodes: Iterable[fx.Node], first: fx.Node, last: fx.Node) -> bool:
        """Whether something between two nodes writes to one of some tensors."""
        return any(first < write < last for write in self._written(nodes))

    def is_ever_written(self, nodes: Iterable[fx.Node]) -> bool:
        """Whether something writes to one of some tensors."""
        return any(self._written(nodes))

    def _written(self, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """What writes to some tensors, or to what nobody knows."""
        return (write for key in {self._keys[node] for node in nodes} | {None} for write in self._writes.get(key, ()))

    def sets_gradients(self, first: fx.Node, last: fx.Node) -> bool:
        """Whether gradients are switched on or off between two nodes."""
        between = self._nodes[self._place[first] : self._place[last]]
        return any(getattr(node.target, "__name__", "") == "_set_grad_enabled" for node in between)

    def after(self, root: fx.Node, among: Iterable[fx.Node]) -> set[fx.Node]:
        """Which of some nodes, in graph order, are computed from another node, which is included."""
        found = {root}
        for node in among:
            if node > root and not found.isdisjoint(self.reads(node)):
                found.add(node)
        return found

    def following(self, node: fx.Node, count: int) -> list[fx.Node]:
        """So many nodes of the graph that come after a node."""
        start = self._place[node] + 1
        return self._nodes[start : start + count]

    def idle(self, nodes: list[fx.Node], outputs: Collection[fx.Node], read: Collection[fx.Node]) -> set[fx.Node]:
        """Which of some nodes nothing needs once their outputs come from elsewhere, and ``read`` is still read."""
        inside = set(nodes)
        used = {node for node in inside.difference(outputs) if not node.users.keys() <= inside}
        needed = closure(used | inside.intersection(read), lambda node: inside.intersection(self.reads(node)))
        return {node for node in inside - needed if node.op in _CALLS}
