"""Tensors over one memory that count writes each for itself: what is written to one is seen in all that are used."""

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import refresh
from marlin_w4a16.passes.live import binding
from marlin_w4a16.passes.live.call import LiveCall
from marlin_w4a16.passes.mixture.stacks import pack_stack

pytestmark = pytest.mark.usefixtures("without_inductor")

NAMES = ("codes", "scales", "factor", "table")
X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


def compiled(function):
    return torch.compile(function, backend="marlin_w4a16", fullgraph=True)


def parameters_of(module: nn.Module) -> nn.Module:
    for name in NAMES:
        setattr(module, name, nn.Parameter(getattr(module, name).data, requires_grad=False))
    return module


def over(tensor: Tensor) -> nn.Parameter:
    """A parameter over the same memory with a counter of its own."""
    return nn.Parameter(tensor.data, requires_grad=False)


def write(module: nn.Module, name: str) -> None:
    tensor = getattr(module, name)
    tensor.copy_(tensor.flip(0) if tensor.ndim == 2 else tensor * 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_shallow_copy_shares_the_memory_and_the_mark_but_not_the_version(fp4_linear, assert_near, name):
    module = fp4_linear()
    parameters_of(module)
    run, tensor = compiled(module), getattr(module, name)
    assert_near(run(X), module(X))
    twin = copy.copy(tensor)
    assert (twin.data_ptr(), twin._version) == (tensor.data_ptr(), tensor._version)
    write(module, name)
    setattr(module, name, twin)
    for _ in range(2):
        assert_near(run(X), module(X))
    torch.utils.swap_tensors(twin, tensor)
    assert_near(run(X), module(X))


def test_shallow_copies_that_are_written_and_replaced(fp4_linear, assert_near):
    """Each lies over the same memory, and every second one at the same address, as the same object would."""
    module = fp4_linear()
    module.factor = nn.Parameter(module.factor, requires_grad=False)
    run, factor = compiled(module), module.factor
    for _ in range(6):
        module.factor = copy.copy(factor)
        module.factor.mul_(2)
        assert_near(run(X), module(X))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", ["run write", "write run", "run write run"])
@pytest.mark.parametrize("twin", [copy.copy, lambda p: nn.Parameter(p.data, requires_grad=False)], ids=["copy", "data"])
def test_what_comes_back_after_a_copy_of_it_was_used_is_looked_at(fp4_linear, assert_near, name, steps, twin):
    module = parameters_of(fp4_linear())
    run, tensor = compiled(module), getattr(module, name)
    run(X)
    setattr(module, name, twin(tensor))
    for step in steps.split():
        if step == "run":
            assert_near(run(X), module(X))
        else:
            write(module, name)
    setattr(module, name, tensor)
    for _ in range(2):
        assert_near(run(X), module(X))


def test_tensors_over_one_memory_take_turns_and_are_packed_once_more(fp4_linear, assert_near, monkeypatch):
    module = fp4_linear()
    run, turns, packed = compiled(module), [module.codes, copy.copy(module.codes)], []
    monkeypatch.setattr(binding, "pack_stack", lambda *args: packed.append(1) or pack_stack(*args))
    for _ in range(3):
        for module.codes in turns:
            assert_near(run(X), module(X))
    assert len(packed) == 3
    module.codes.bitwise_xor_(1)
    for _ in range(3):
        assert_near(run(X), module(X))
        for module.codes in turns:
            assert_near(run(X), module(X))
    assert len(packed) == 5


OTHERS = {
    "copy.copy": (copy.copy, False),
    "data": (lambda p: p.data, False),
    "parameter of data": (over, False),
    "detach": (Tensor.detach, True),
    "parameter": (lambda p: nn.Parameter(p, requires_grad=False), True),
    "view": (lambda p: p.view(2, 2), True),
}


@pytest.mark.parametrize("other, shared", OTHERS.values(), ids=OTHERS)
def test_which_tensors_over_one_memory_share_the_counter_of_writes(other, shared):
    """What `passes/live` goes by, of torch."""
    tensor = nn.Parameter(torch.zeros(4), requires_grad=False)
    twin = other(tensor)
    before = tensor._version
    twin.add_(1)
    assert bool(tensor.all()) and (tensor._version > before) == shared


def pair_of(fp4_linear, name: str) -> nn.Sequential:
    """Two linears, a tensor of the second over the memory of the first one's."""
    model = nn.Sequential(*(parameters_of(fp4_linear(64, 64)) for _ in range(2)))
    setattr(model[1], name, over(getattr(model[0], name)))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", [0, 1])
def test_both_in_one_graph(fp4_linear, assert_near, name, which):
    """The first weight is looked up before the second one shows that its memory was written to."""
    model = pair_of(fp4_linear, name)
    run = compiled(model)
    with patch.object(LiveCall, "_look_up", autospec=True, side_effect=LiveCall._look_up) as look_up:
        for _ in range(3):
            before = look_up.call_count
            for _ in range(3):
                assert_near(run(X), model(X))
            assert look_up.call_count <= before + 2
            write(model[which], name)
            assert_near(run(X), model(X))


def test_one_in_two_graphs_both_in_one_of_them(fp4_linear, assert_near):
    model = pair_of(fp4_linear, "codes")
    first, both = compiled(lambda x: model[0](x)), compiled(model)
    for _ in range(3):
        assert_near(first(X), model[0](X))
        assert_near(both(X), model(X))
        write(model[1], "codes")
        assert_near(both(X), model(X))
        assert_near(first(X), model[0](X))


def test_graphs_that_share_the_copy(fp4_linear, assert_near):
    module = parameters_of(fp4_linear())
    runs, codes = [compiled(module), compiled(lambda x: module(x) + 0)], module.codes
    for _ in range(2):
        for used in (0, 1):
            for run in runs:
                assert_near(run(X), module(X))
            module.codes = over(codes)
            write(module, "codes")
            assert_near(runs[used](X), module(X))
            module.codes = codes


def test_one_that_a_graph_was_called_with_while_it_ran_eagerly(fp4_linear, assert_near):
    model = nn.Sequential(*(parameters_of(fp4_linear(64, 64)) for _ in range(2)))
    both, second, codes = compiled(model), compiled(lambda x: model[1](x)), model[1].codes
    for run, eager in ((both, model), (second, model[1])):
        assert_near(run(X), eager(X))
    model[0].table[3] = 1.4
    model[1].codes = over(codes)
    write(model[1], "codes")
    assert torch.equal(both(X), model(X))
    model[1].codes = codes
    assert_near(second(X), model[1](X))


def test_views_of_one_storage_take_turns_and_are_packed_once(fp4_linear, assert_near, monkeypatch):
    """As stacked experts are."""
    modules = [parameters_of(fp4_linear()) for _ in range(3)]
    stack, run, packed = torch.stack([m.codes for m in modules]), compiled(lambda module, x: module(x)), []
    for module, codes in zip(modules, stack, strict=True):
        module.codes = over(codes)
    monkeypatch.setattr(binding, "pack_stack", lambda *args: packed.append(1) or pack_stack(*args))
    for _ in range(3):
        for module in modules:
            assert_near(run(module, X), module(X))
    assert len(packed) == 3
    write(modules[1], "codes")
    for module in modules:
        assert_near(run(module, X), module(X))
    assert len(packed) == 4


def wrapped() -> nn.Module:
    """A linear whose weight is a wrapper subclass."""
    NVFP4Tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor
    module = nn.Linear(64, 48, bias=False).requires_grad_(False)
    module.weight = nn.Parameter(NVFP4Tensor.to_nvfp4(module.weight, is_swizzled_scales=True), requires_grad=False)
    return module


@pytest.mark.parametrize("steps", ["run write", "write run", "run write run"])
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("twin", [copy.copy, over], ids=["copy", "data"])
@torch.no_grad()
def test_wrappers_that_hold_the_same_parts(assert_near, steps, part, twin):
    """What is written to a wrapper is counted by neither its parts nor another wrapper."""
    module, other = wrapped(), wrapped()
    run, weight = compiled(module), module.weight
    assert_near(run(X), module(X))
    module.weight = twin(weight)
    for step in steps.split():
        if step == "run":
            assert_near(run(X), module(X))
        elif part:
            module.weight.qdata.copy_(other.weight.qdata)
        else:
            module.weight.copy_(other.weight)
    if steps.endswith("run"):
        module.weight = weight
    for _ in range(2):
        assert_near(run(X), module(X))


def copies_of_copies(module: nn.Module) -> None:
    """Every second one at the id that the first one had, written to as often, with the mark that it had."""
    for _ in range(2):
        module.factor = copy.copy(module.factor)
    module.factor.mul_(1.25)


def swapped_with_a_copy(module: nn.Module) -> None:
    twin = copy.copy(module.factor)
    for _ in range(module.factor._version):
        twin.mul_(1.25)
    torch.utils.swap_tensors(module.factor, twin)


@pytest.mark.parametrize("change", [copies_of_copies, swapped_with_a_copy])
def test_copies_that_no_call_has_seen_are_seen_after_refresh(fp4_linear, assert_near, change):
    module = parameters_of(fp4_linear())
    module.factor.mul_(1.5)
    run = compiled(module)
    for _ in range(20):
        assert_near(run(X), module(X))
        change(module)
        refresh(module)
    assert_near(run(X), module(X))
