"""The stage after replacing: ops of this project become fewer of them.

A fusion takes a graph and edits it. It finds ops by what they are called with, so weights that were bound by the pass
and weights that their modules own packed are one to it. Nodes that ops stand for are still there, and go afterwards.
"""

from collections.abc import Callable, Iterable

from torch import fx

from marlin_w4a16.passes.fuse.unread import drop_unread

FUSIONS: tuple[Callable[[fx.Graph], None], ...] = (drop_unread,)


def fuse(graphs: Iterable[fx.Graph]) -> None:
    """Runs every fusion on every graph: the whole and the bodies of its regions."""
    for graph in graphs:
        for fusion in FUSIONS:
            fusion(graph)
