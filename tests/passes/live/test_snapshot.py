import copy
import gc

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16.passes.graph.torch_private import mark_written
from marlin_w4a16.passes.live.snapshot import Snapshot, mark, state_of


def tensors() -> list[Tensor]:
    return [torch.zeros(4), torch.zeros(2, 2, dtype=torch.uint8)]


def snapshot(values: list[Tensor], *on_death) -> Snapshot:
    return Snapshot(values, state_of(values), *on_death)


def holds(at: Snapshot, values: list[Tensor]) -> bool:
    return at.holds(state_of(values))


def test_it_holds_for_the_same_tensors_unchanged():
    values = tensors()
    assert holds(snapshot(values), values) and not holds(snapshot(values), tensors())
    assert not holds(snapshot(values), values[::-1])


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize(
    "write", [Tensor.zero_, lambda t: t.set_(torch.zeros_like(t)), lambda t: setattr(t, "data", t.clone())]
)
def test_a_write_ends_it(i, write):
    values = tensors()
    at = snapshot(values)
    write(values[i])
    assert not holds(at, values)


def test_memory_that_is_replaced_while_it_lives_on_ends_it():
    values = tensors()
    at, kept = snapshot(values), values[0].data
    values[0].data = kept.clone()
    assert not holds(at, values)


def test_views_of_one_memory_are_told_apart():
    rows = torch.zeros(8, 4)
    first, second = [rows[:4]], [rows[:4]]
    at = snapshot(first)
    assert state_of(first)[2:] == state_of(second)[2:]
    assert holds(at, first) and not holds(at, second)


def test_shallow_copies_are_told_apart_and_get_marks_of_their_own():
    values = [nn.Parameter(torch.zeros(4), requires_grad=False)]
    at, copies = snapshot(values), [copy.copy(values[0])]
    assert state_of(values)[1:] == state_of(copies)[1:]
    assert holds(at, values) and not holds(at, copies)
    mark(copies)
    deaths: list[object] = []
    later = snapshot(copies, deaths.append)
    assert holds(at, values) and holds(later, copies) and state_of(values)[1] != state_of(copies)[1]
    del copies
    gc.collect()
    assert len(deaths) == 1 and holds(at, values)


def test_a_copy_of_a_tensor_that_died_has_another_key():
    """Its own copy may come to lie where the first one did, with the same mark, address and version."""
    values = [nn.Parameter(torch.zeros(4), requires_grad=False)]
    mark(values)
    before, copies = state_of(values)[1], [copy.copy(values.pop())]
    assert state_of(copies)[1] == before
    mark(copies)
    assert state_of(copies)[1] != before


def test_it_ends_others_that_lie_where_it_does_and_knows_them_still():
    memory = torch.zeros(8)
    whole, part, beside, twin = [memory.data], [memory.data[2:4]], [memory.data[4:]], [memory.data]
    before = [(snapshot(values), values) for values in (whole, part, beside)]
    snapshot(part).end_others()
    assert [holds(at, values) for at, values in before] == [False, True, True]
    snapshot(twin).end_others()
    assert [(holds(at, values), at.held(state_of(values))) for at, values in before] == [(False, True)] * 3
    whole[0].zero_()
    assert not before[0][0].held(state_of(whole))


def test_it_ends_those_that_watch_not_all_that_lies_there():
    memory = torch.zeros(8)
    one, both = [memory.data], [memory.data]
    both += one
    alone, together = snapshot(one), snapshot(both)
    together.end_others()
    assert not holds(alone, one) and holds(together, both)
    snapshot(one).end_others()
    assert not holds(together, both)


def test_marking_again_changes_nothing():
    values = tensors()
    at = snapshot(values)
    mark(values)
    assert holds(at, values)
    torch.utils.swap_tensors(*values)
    mark(values)
    swapped = state_of(values)
    mark(values)
    assert state_of(values) == swapped


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_that_nothing_sees_can_be_marked(inference):
    with torch.inference_mode(inference):
        values = tensors()
    at = snapshot(values)
    mark_written(values[1:])
    assert not holds(at, values) and holds(snapshot(values), values)
    again = snapshot(values)
    mark_written(values)
    assert not holds(again, values)


def test_marking_one_inference_tensor_leaves_the_others():
    with torch.inference_mode():
        values, others = tensors(), tensors()
    at = snapshot(values)
    mark_written(others)
    assert holds(at, values)


def test_it_ends_when_memory_is_given_up_though_address_and_version_come_back():
    """What an allocator may do between two calls: free the memory of a weight, and give it to the next one."""
    value = torch.zeros(1 << 12)
    at = snapshot([value])
    state = state_of([value])
    value.data = torch.zeros(0)
    assert not at.holds(state)


def test_it_does_not_end_while_a_view_keeps_the_memory():
    value = torch.zeros(4)
    at, state = snapshot([value]), state_of([value])
    view = value.view(2, 2)
    value.data = torch.zeros(0)
    assert at.holds(state)
    del view
    assert not at.holds(state)


def test_death_is_told_and_ends_it():
    deaths, values = [], tensors()
    at, state = snapshot(values, lambda _: deaths.append(1)), state_of(values)
    left = values.pop()
    del values
    gc.collect()
    assert deaths == [1] and not at.holds(state) and not holds(at, [left, left])


def test_it_keeps_nothing_alive():
    import weakref

    values = tensors()
    at = snapshot(values)
    refs = [weakref.ref(x) for t in values for x in (t, t.untyped_storage())]
    del values
    gc.collect()
    assert at and not any(ref() for ref in refs)
