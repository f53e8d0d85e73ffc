"""A graph from Dynamo as it is analysed: flat, with its constants and its live inputs."""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.passes.graph.constants import Constants, find_constants
from marlin_w4a16.passes.graph.flow import Flow
from marlin_w4a16.passes.graph.nodes import example, storage
from marlin_w4a16.passes.graph.regions import Regions
from marlin_w4a16.passes.graph.torch_private import is_plain, size_hint


class Traced:
    """A graph from Dynamo under analysis; itself it is left as it was.

    Attributes:
        inputs: its live example inputs.
        regions: a copy to be edited, region by region.
        flat: the copy as one graph, for analysis.
        constants: those of the flat graph.
        live: the inputs by the placeholders of the flat graph.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self.inputs = inputs
        self.regions = Regions(gm)
        self.flat = self.regions.flatten()
        self.constants = find_constants(self.flat.graph)
        _fix_sizes(self.constants)
        self.live = dict(zip(self.flat.graph.find_nodes(op="placeholder"), inputs, strict=True))

    @functools.cached_property
    def flow(self) -> Flow:
        """What the nodes of the flat graph read and write."""
        return Flow(self.flat.graph, self.constants)

    def sees(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether a node of the flat graph can be read where another one stands."""
        return self.regions.sees(self.flat.origin[node], self.flat.origin[other].graph)


def _fix_sizes(constants: Constants) -> None:
    """Gives constants the sizes that they were traced with: a table that is a Python global may have dynamic ones."""
    for node in (*constants.leaves, *constants.nodes):
        value = example(node)
        if is_plain(value) and (fixed := _with_hints(value)) is not value:
            node.meta |= {"storage": storage(node), "example_value": fixed}


def _with_hints(value: Tensor) -> Tensor:
    """A fake tensor with the sizes that it was traced with; itself where it has no others, or where data tell them."""
    shape, strides, offset = value.shape, value.stride(), value.storage_offset()
    if all(isinstance(size, int) for size in (*shape, *strides, offset)):
        return value
    sizes, steps, first = list(map(size_hint, shape)), list(map(size_hint, strides)), size_hint(offset)
    if min(*sizes, *steps, first) < 0:
        return value
    held = first + 1 + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    with value.fake_mode:  # type: ignore[attr-defined]
        return value.new_empty(max(held, 0)).as_strided(sizes, steps, first)
