"""The values of constants: computed as the traced graph would, in-place writes and all."""

import operator
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16.passes.graph.constants import find_constants, slice_of
from marlin_w4a16.passes.graph.nodes import value_of

TABLE = torch.linspace(-2, 5, 8)


def after(t, write):
    """A tensor once it has been written to."""
    write(t)
    return t


def by_setitem(w):
    t = torch.empty(8)
    t[..., 0::2], t[..., 1::2] = w[:4], w[4:]
    return t


def by_two_outs(w):
    t, exponent = w.clone(), torch.empty(8, dtype=torch.int32)
    torch.frexp(w * 3, out=(t, exponent))
    return t


def after_a_view(w):
    view = w.clone().flip(0).view(2, 4).view(8)
    view.mul_(2)
    return view


def by_augmented_assignment(w):
    t = w.clone()
    alias = t
    t += 1
    return alias


IN_PLACE = {
    "by_setitem": by_setitem, "by_copy": lambda w: after(torch.empty(8), lambda t: t.copy_(w.flip(0))),
    "by_out": lambda w: after(torch.empty(8), lambda t: torch.mul(w, 3, out=t)), "by_two_outs": by_two_outs,
    "through_views": lambda w: after(w.clone(), lambda t: t.view(2, 4)[1].detach().add_(1)),
    "after_a_view": after_a_view, "with_its_result_dropped": lambda w: after(w * 2, lambda t: t.mul_(3)),
    "by_augmented_assignment": by_augmented_assignment,
    "by_inplace_argument": lambda w: after(w.clone(), lambda t: F.relu(t, inplace=True)),
    "by_inplace_argument_without_its_name": lambda w: after(w.clone(), lambda t: F.relu(t, True)),
    "by_foreach": lambda w: after(w.clone(), lambda t: torch._foreach_mul_([t], 2.0)),
    "by_init": lambda w: after(w.clone(), nn.init.zeros_),
}  # fmt: skip


@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
def test_writes_to_a_temporary_belong_to_it(last_sum, write):
    total, value, constants, inputs = last_sum(lambda x: x + write(TABLE), torch.ones(8))
    nodes = slice_of(value, total, constants)
    live = dict(zip(value.graph.find_nodes(op="placeholder"), inputs, strict=True))
    found = value_of(value, nodes, {n: live[n] for n in nodes if n in constants.leaves})
    assert torch.equal(found, write(TABLE)) and not torch.equal(found, TABLE)


def test_a_write_counts_from_where_it_stands(trace):
    def two_reads(x):
        t = TABLE.clone()
        early = x + t
        t.mul_(2)
        return early, x + t

    gm, _ = trace(two_reads, torch.ones(8))
    constants = find_constants(gm.graph)
    first, second = [n for n in gm.graph.nodes if n.target is operator.add]
    (leaf,) = constants.leaves
    read = [value_of(n.args[1], slice_of(n.args[1], n, constants), {leaf: TABLE}) for n in (first, second)]
    assert torch.equal(read[0], TABLE) and torch.equal(read[1], 2 * TABLE)


class Live(TorchDispatchMode):
    """The most tensors computed at once that were alive together."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def _died(self):
        self.now -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.now += 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(out, self._died)
        return out


def test_dead_values_are_freed_on_the_way(last_sum):
    def chain(x):
        value = TABLE
        for _ in range(10):
            value = value.sin() * 2
        return x + value

    total, value, constants, _ = last_sum(chain, torch.ones(8))
    (leaf,) = constants.leaves
    with Live() as live:
        value_of(value, slice_of(value, total, constants), {leaf: TABLE})
    assert live.peak == 2
