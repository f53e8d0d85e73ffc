import gc
import weakref
from unittest.mock import patch

import pytest
import torch
from torch import nn

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.live import call
from marlin_w4a16.passes.live.call import LiveCall
from marlin_w4a16.passes.rewrite import rewrite


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


class Live:
    """A live call of two linears in a row whose compiled form hands back the packed tensors it was given."""

    def __init__(self, trace, model: nn.Module):
        gm, self.inputs = trace(lambda m, x: m(x), model, torch.ones(3, 64))
        self.names = {id(t): name for name, t in tensors(model).items()}
        self.call = LiveCall(lambda *inputs: inputs[-6:], lambda *inputs: "as traced", rewrite(gm, self.inputs))

    def __call__(self, model: nn.Module):
        live = tensors(model)
        return self.call(*(live[self.names[id(t)]] if id(t) in self.names else t for t in self.inputs))


@pytest.fixture
def model(fp4_linear):
    return lambda: nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))


@pytest.fixture
def live(trace, model) -> Live:
    return Live(trace, model())


def assert_holds(packed, model: nn.Module) -> None:
    for i, linear in enumerate(model):
        weight = PackedFP4(*packed[3 * i : 3 * i + 3], 64, 64, "e4m3", 16)
        torch.testing.assert_close(dequantize(weight, torch.float32), linear.weight(), rtol=1e-6, atol=0)


def test_the_packed_tensors_are_those_of_the_instance(live, model):
    a, b = model(), model()
    for instance in (a, b, b, a):
        assert_holds(live(instance), instance)


def test_instances_that_share_memory_are_told_apart(live, model):
    a, b = model(), model()
    rows = torch.cat((a[0].codes, b[0].codes))
    b[0].scales, b[0].factor, b[0].table, b[1] = a[0].scales, a[0].factor, a[0].table, a[1]
    a[0].codes, b[0].codes = (nn.Parameter(part, requires_grad=False) for part in (rows[:64], rows[::2]))
    for instance in (a, b, a):
        assert_holds(live(instance), instance)


def test_an_unchanged_instance_gets_the_same_tensors(live, model):
    a, b = model(), model()
    first = live(a)
    live(b)
    assert all(found is packed for found, packed in zip(live(a), first, strict=True))


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("name", ["codes", "scales", "factor"])
def test_one_changed_leaf_is_noticed(live, model, i, name):
    a, b = model(), model()
    before = [t.data_ptr() for t in live(a)]
    getattr(a[i], name).copy_(getattr(b[i], name))
    after = live(a)
    assert_holds(after, a)
    assert [t.data_ptr() for t in after] == before


LAYOUTS = {
    "strides": lambda t: t.as_strided(t.shape, (1, t.shape[0])),
    "shape": lambda t: t[:16],
    "dtype": lambda t: t.view(torch.int8),
}


@pytest.fixture
def looked_up():
    """Counts how often the leaves of an instance are looked up."""
    with patch.object(LiveCall, "_look_up", autospec=True, side_effect=LiveCall._look_up) as look_up:
        yield lambda: look_up.call_count


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_another_layout_of_the_same_memory_is_seen_where_no_guard_compares_it(
    live, model, looked_up, monkeypatch, i, lay_out
):
    monkeypatch.setattr(call, "GUARDS_LAYOUTS", False)
    instance = model()
    live(instance)
    codes = instance[i].codes
    before = codes.data_ptr(), codes._version
    for times in (1, 3):
        codes.data, old = lay_out(codes.data), codes.data
        live(instance)
        assert (codes.data_ptr(), codes._version) == before and looked_up() == times + 1
        codes.data = old
        assert_holds(live(instance), instance)
        assert looked_up() == times + 2


@pytest.mark.parametrize("guards", [False, True])
def test_an_unchanged_instance_is_looked_up_once(live, model, looked_up, monkeypatch, guards):
    monkeypatch.setattr(call, "GUARDS_LAYOUTS", guards)
    instances = model(), model()
    for instance in 3 * instances:
        assert_holds(live(instance), instance)
    assert looked_up() == len(instances)


def test_packed_tensors_die_with_the_instance(live, model):
    kept, gone = model(), model()
    refs = [weakref.ref(t) for t in live(gone)]
    live(kept)
    assert_holds(live(gone), gone)
    del gone
    gc.collect()
    assert not any(ref() for ref in refs)
    assert_holds(live(kept), kept)


def test_an_instance_is_not_kept_alive(live, model):
    instance = model()
    live(instance)
    refs = [weakref.ref(t) for t in tensors(instance).values()]
    del instance
    gc.collect()
    assert not any(ref() for ref in refs)


def test_instances_at_the_addresses_of_dead_ones_are_told_apart(live, model):
    for _ in range(30):
        instance = model()
        assert_holds(live(instance), instance)


def test_a_weight_that_is_no_longer_fp4_runs_as_traced_until_it_is_again(live, model, caplog):
    instance = model()
    table = instance[1].table.clone()
    for _ in range(2):
        instance[1].table.mul_(1.01)
        assert live(instance) == live(instance) == "as traced"
        instance[1].table.copy_(table)
        assert_holds(live(instance), instance)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.message.startswith("a weight changed and is no longer FP4")
