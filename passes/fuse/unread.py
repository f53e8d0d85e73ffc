"""Ops whose result nothing reads."""

from torch import fx

from marlin_w4a16.fake_impls.library import NAMESPACE
from marlin_w4a16.passes.graph.torch_private import op_namespace


def drop_unread(graph: fx.Graph) -> None:
    """Erases the calls of this project's ops that nothing reads: they are functional, so nothing else is lost.

    Packed tensors of a module that they alone have read are then no inputs of the compiled graph.
    """
    for node in reversed(list(graph.nodes)):
        if not node.users and op_namespace(node.target) == NAMESPACE:
            graph.erase_node(node)
