"""What was traced of an operation in a mixture, beside what is known of its arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from marlin_w4a16.passes.graph.nodes import example
from marlin_w4a16.passes.graph.torch_private import is_multiple


@dataclass(frozen=True, slots=True)
class Call:
    """What was traced of a call.

    Attributes:
        example: what it gave.
        sized: so many numbers that change between calls, such as sizes, are among its arguments.
        changing: the places, or names, of such arguments.
        counted: it gave a number that is always as many times the number of tokens.
        fixed: of its first argument, the axes whose size does not change.
    """

    example: Any
    sized: int
    changing: frozenset[object]
    counted: bool
    fixed: tuple[bool, ...]

    @classmethod
    def of(cls, node: fx.Node, values: Mapping[fx.Node, Any], tokens: Sequence[Any]) -> "Call":
        """That of a node, from what is known of the nodes before it, and the number of tokens as it was traced.

        ``tokens``: it may have been traced in several ways.
        """
        first = example(node.args[0]) if node.args else None
        sized = sum(isinstance(values.get(used), int) for used in node.all_input_nodes)
        sizes = first.shape if isinstance(first, Tensor) else ()
        named = (*enumerate(node.args), *node.kwargs.items())
        changing = frozenset(
            at for at, given in named if isinstance(given, fx.Node) and isinstance(values.get(given), int)
        )
        counted = any(is_multiple(example(node), count) for count in tokens)
        return cls(example(node), sized, changing, counted, tuple(isinstance(size, int) for size in sizes))
