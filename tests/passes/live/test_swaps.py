"""Tensors that were compiled can be swapped (`torch.utils.swap_tensors`), and the next call runs what they are then."""

import copy
import io

import pytest
import torch
from torch import nn

from marlin_w4a16 import refresh

pytestmark = pytest.mark.usefixtures("without_inductor")

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


@pytest.fixture
def modules_swap():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def compiled(module):
    return torch.compile(module, backend="marlin_w4a16", fullgraph=True)


def swap(module: nn.Module, other: nn.Module) -> None:
    pairs = zip((*module.parameters(), *module.buffers()), (*other.parameters(), *other.buffers()), strict=True)
    for mine, theirs in pairs:
        torch.utils.swap_tensors(mine, theirs)


@pytest.mark.parametrize("inference", [False, True])
def test_all_tensors_of_two_modules(fp4_linear, assert_near, levels, inference):
    with torch.inference_mode(inference):
        module, other = fp4_linear(), fp4_linear()
        run = compiled(lambda module, x: module(x))
        for _ in range(3):
            before = run(module, X)
            assert_near(before, module(X))
            assert_near(run(other, X), other(X))
            swap(module, other)
            assert torch.equal(run(other, X), before)
    assert levels() == ["INFO"]


def test_one_that_shares_the_memory_but_not_the_version(fp4_linear, assert_near):
    module = fp4_linear()
    twin, run = nn.Parameter(module.codes.data, requires_grad=False), compiled(module)
    assert_near(run(X), module(X))
    module.codes.bitwise_xor_(1)
    torch.utils.swap_tensors(module.codes, twin)
    assert_near(run(X), module(X))


def test_inference_tensors_that_were_marked_as_written(fp4_linear, assert_near):
    with torch.inference_mode():
        module, other = fp4_linear(), fp4_linear()
        run = compiled(module)
        for _ in range(2):
            module.codes.copy_(other.codes)
            refresh(module)
            assert_near(run(X), module(X))
            torch.utils.swap_tensors(module.codes, fp4_linear().codes)
            assert_near(run(X), module(X))


def reload(module, other):
    module.load_state_dict(other.state_dict())


CONVERSIONS = {
    "load_state_dict": reload,
    "to": lambda module, other: module.to("cpu"),
    "double, then float": lambda module, other: module.double().float(),
    "another device's copy": lambda module, other: module._apply(lambda t: t.roll(1, 0) if t.ndim == 2 else t.clone()),
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_modules_that_swap_on_conversion(fp4_linear, assert_near, modules_swap, convert):
    module = fp4_linear()
    run = compiled(module)
    for _ in range(2):
        assert_near(run(X), module(X))
        convert(module, fp4_linear())
    assert_near(run(X), module(X))


def test_marks_are_neither_copied_nor_saved(fp4_linear, assert_near):
    """Files can be read without this package, and with ``weights_only``."""
    module = fp4_linear()
    run = compiled(lambda module, x: module(x))
    run(module, X)
    file = io.BytesIO()
    torch.save([module.codes, module.factor], file)
    assert b"marlin_w4a16.passes" not in file.getvalue()
    file.seek(0)
    twin = copy.deepcopy(module)
    twin.codes, twin.factor = torch.load(file, weights_only=True)
    module.codes.bitwise_xor_(1)
    for instance in (twin, module, twin):
        assert_near(run(instance, X), instance(X))
    torch.utils.swap_tensors(twin.codes, module.codes)
    assert_near(run(twin, X), twin(X))
