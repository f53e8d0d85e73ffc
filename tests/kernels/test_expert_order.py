"""Orders of gates and ups: values that are strings, and the rows they stand for."""

import copy
import json
import pickle

import pytest
import torch

from marlin_w4a16.kernels.expert_order import ORDERS, Order, kinds, packed_rows

EVERY_ORDER = pytest.mark.parametrize("order", ORDERS)
GATES = {  # of six rows, and the ups beside them
    "gate_up": ([0, 1, 2], [3, 4, 5]),
    "up_gate": ([3, 4, 5], [0, 1, 2]),
    "interleaved": ([0, 2, 4], [1, 3, 5]),
    "interleaved_up_gate": ([1, 3, 5], [0, 2, 4]),
}


@EVERY_ORDER
def test_an_order_is_its_string(order):
    name = order.value
    assert order == name and Order(name) is order and hash(order) == hash(name) and GATES[order] is GATES[name]
    assert (str(order), repr(order), f"{order}", f"{order!r:>25}") == (name, repr(name), name, f"{name!r:>25}")
    assert json.dumps({"order": order}) == json.dumps({"order": name})


@EVERY_ORDER
def test_it_survives_copies_pickles_and_tracing(order, tmp_path):
    assert copy.deepcopy(order) is order and pickle.loads(pickle.dumps(order)) is order
    torch.save({"order": order}, tmp_path / "order.pt")
    assert torch.load(tmp_path / "order.pt", weights_only=False)["order"] is order

    def gates(sums: torch.Tensor) -> torch.Tensor:
        return sums[..., order.slices(sums.shape[-1])[0]] if order.interleaved else sums[..., kinds(order, 6)[0]]

    sums = torch.arange(6.0).expand(2, 6)
    assert torch.equal(torch.compile(gates, backend="eager", fullgraph=True)(sums), gates(sums))


def test_another_order_is_refused():
    for wrong in ("gate-up", "", "INTERLEAVED", 1):
        expected = "'gate_up', 'up_gate', 'interleaved', 'interleaved_up_gate'"
        with pytest.raises(ValueError, match=f"order: found {wrong!r}, expected one of .{expected}"):
            packed_rows(8, 16, wrong)


@EVERY_ORDER
def test_slices_are_the_gates_and_the_ups(order):
    rows = torch.arange(6)
    for slices in (order.slices(6), kinds(order, 6), kinds(order.value, 6)):
        assert tuple(rows[at].tolist() for at in slices) == GATES[order]
    assert kinds(None, 6) == (slice(None),)
    first = GATES[order][0]
    assert (order.up_first, order.interleaved) == (first[0] in (1, 3), first[1] - first[0] == 2)
