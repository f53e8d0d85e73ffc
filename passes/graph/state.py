"""The state of torch that a graph sets for the operations that follow: autocast, which is followed, and the rest."""

import types
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import fx

from marlin_w4a16.passes.graph.torch_private import ENTER_AUTOCAST, EXIT_AUTOCAST

# Functions of torch by these names change no value.
_HARMLESS = frozenset(
    {"_set_fwd_grad_enabled", "_set_grad_enabled", "_set_multithreading_enabled", "_set_tensor_requires_grad",
     "set_grad_enabled", "set_inplace_requires_grad_allowed"}
)  # fmt: skip


def note_state(graph: fx.Graph) -> set[fx.Node]:
    """Notes at the nodes of a flat graph the autocasts they stand in; returns those whose state is not known.

    What else a function of torch sets, such as the default dtype, may be in force from there on. State at the start is
    that in which the graph was traced: Dynamo guards it, and compiles in it.
    """
    unknown: set[fx.Node] = set()
    entered: list[fx.Node] = []
    known = True
    for node in graph.nodes:
        known = known and not _sets(node)
        if node.target is ENTER_AUTOCAST:
            entered.append(node)
        elif node.target is EXIT_AUTOCAST:
            entered = [enter for enter in entered if enter is not node.args[0]]
        elif entered:
            node.meta["autocast"] = tuple(enter.args for enter in entered)
        if not known:
            unknown.add(node)
    return unknown


def autocast_of(node: fx.Node) -> AbstractContextManager[object]:
    """The autocasts that a graph has entered and not left where a node stands."""
    if "autocast" not in node.meta:
        return nullcontext()
    stack = ExitStack()
    for arguments in node.meta["autocast"]:
        stack.enter_context(torch.autocast(*arguments))
    return stack


def autocast_dtype(node: fx.Node, device_type: str) -> torch.dtype | None:
    """What autocast lowers products to where a node stands; None where it does not."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    with autocast_of(node):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _sets(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, types.FunctionType | types.BuiltinFunctionType):
        return False
    if (target.__module__ or "").partition(".")[0] != "torch" or target.__name__ in _HARMLESS:
        return False
    return target.__name__.lstrip("_").startswith("set_")
