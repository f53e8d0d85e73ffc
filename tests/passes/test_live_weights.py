"""Never another weight's result: a compiled graph runs with the weights of the call, whatever happened to them."""

import copy
import threading

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import quantize_mxfp4, quantize_nvfp4

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


@pytest.fixture
def logged(caplog):
    """The levels of what the backend has said so far."""
    caplog.set_level("INFO", "marlin_w4a16")
    return lambda: [r.levelname for r in caplog.records if r.name == "marlin_w4a16"]


def compiled(function):
    return torch.compile(function, backend="marlin_w4a16", fullgraph=True)


@pytest.mark.parametrize("how", ["function", "method"])
def test_two_instances_through_one_compiled_function(fp4_linear, assert_near, logged, how):
    run = compiled((lambda module, x: module(x)) if how == "function" else fp4_linear.forward)
    a, b = fp4_linear(), fp4_linear()
    for module in (a, b, a, b, b):
        assert_near(run(module, X), module(X))
    assert logged() == ["INFO"]


def test_layers_compiled_one_by_one(fp4_linear, assert_near, logged):
    model = nn.Sequential(*(fp4_linear(64, 64) for _ in range(3)))
    expected = model(X)
    for layer in model:
        layer.compile(backend="marlin_w4a16", fullgraph=True)
    for _ in range(2):
        assert_near(model(X), expected)
    assert logged() == ["INFO"]


def test_layers_after_a_graph_break(fp4_linear, assert_near, logged):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(fp4_linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
                torch._dynamo.graph_break()
            return x

    model = Broken()
    run = torch.compile(model, backend="marlin_w4a16")
    for _ in range(2):
        assert_near(run(X), model(X))
    assert set(logged()) == {"INFO"}


def load_state_dict(module, other):
    module.load_state_dict(other.state_dict())


def assign_state_dict(module, other):
    module.load_state_dict(other.state_dict(), assign=True)


def copy_(module, other):
    module.codes.copy_(other.codes)


def fill_(module, other):
    module.scales.fill_(0x40)


def data_copy_of_scales(module, other):
    module.scales.data = other.scales.data


def data(module, other):
    module.codes.data = other.codes.clone()


def through_a_view(module, other):
    module.codes[3:5].view(-1)[::2] = 0x21


def in_inference_mode(module, other):
    with torch.inference_mode():
        module.codes.copy_(other.codes)


def new_parameter(module, other):
    module.codes = nn.Parameter(other.codes.clone(), requires_grad=False)


def exchanged_parameters(module, other):
    module.codes, other.codes = other.codes, module.codes


def factor(module, other):
    module.factor.mul_(3)


def new_factor(module, other):
    module.factor = module.factor * 3


CHANGES = (
    load_state_dict, assign_state_dict, copy_, fill_, data_copy_of_scales, data, through_a_view, in_inference_mode,
    new_parameter, exchanged_parameters, factor, new_factor,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_a_changed_weight(fp4_linear, assert_near, logged, change, quantize):
    module = fp4_linear(quantize=quantize)
    run = compiled(module)
    before = run(X)
    assert_near(before, module(X))
    with torch.no_grad():
        change(module, fp4_linear(quantize=quantize))
    for _ in range(2):
        after = run(X)
        assert_near(after, module(X))
    assert (after - before).norm() > 0.01 * before.norm()
    assert logged() == ["INFO"]


def test_a_weight_that_is_no_longer_fp4_runs_eagerly_and_says_so_once(fp4_linear, logged):
    module = fp4_linear()
    run = compiled(module)
    run(X)
    table = module.table.clone()
    module.table[3] = 1.4
    for _ in range(3):
        assert torch.equal(run(X), module(X))
    assert logged() == ["INFO", "WARNING"]
    module.table.copy_(table)
    torch.testing.assert_close(run(X), module(X), rtol=1e-4, atol=1e-4)
    assert logged() == ["INFO", "WARNING"]


def test_an_instance_that_is_no_fp4_does_not_disturb_one_that_is(fp4_linear, assert_near, logged):
    run = compiled(lambda module, x: module(x))
    good, bad = fp4_linear(), fp4_linear()
    bad.scales.data[0, 0] = 0x7F
    for module in (good, bad, good, bad):
        found, expected = run(module, X), module(X)
        assert torch.equal(found.isnan(), expected.isnan())
        assert_near(found.nan_to_num(), expected.nan_to_num())
    assert logged() == ["INFO", "WARNING"]


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_a_weight_of_zeros_that_is_loaded_later(fp4_linear, assert_near, logged, quantize):
    source = fp4_linear(quantize=quantize)
    module = copy.deepcopy(source)
    for tensor in (module.codes, module.scales):
        tensor.zero_()
    run = compiled(module)
    assert torch.equal(run(X), torch.zeros(3, 48))
    module.load_state_dict(source.state_dict())
    assert_near(run(X), source(X))
    assert logged() == ["INFO"]


def test_inference_mode_then_normal_mode(fp4_linear, assert_near):
    module = fp4_linear()
    run = compiled(module)
    for inference in (True, False, True, False):
        with torch.inference_mode(inference):
            assert_near(run(X), module(X))
        module.load_state_dict(fp4_linear().state_dict())
    x = X.clone().requires_grad_()
    run(x).sum().backward()
    assert_near(x.grad, module.weight().sum(0).expand(3, -1))


def test_a_model_made_in_inference_mode(fp4_linear, assert_near):
    with torch.inference_mode():
        a, b = fp4_linear(), fp4_linear()
        run = compiled(lambda module, x: module(x))
        for module in (a, b, a):
            assert_near(run(module, X), module(X))


def test_grad_mode_switched(fp4_linear, assert_near):
    module = fp4_linear()
    run = compiled(module)
    for grad in (False, True, False):
        with torch.set_grad_enabled(grad):
            x = X.clone().requires_grad_()
            out = run(x)
            assert out.requires_grad == grad
            assert_near(out.detach(), module(X))
        module.codes.data = module.codes.roll(1, 0)


def test_threads_that_call_two_instances_at_once(fp4_linear, assert_near):
    run = compiled(lambda module, x: module(x))
    modules = [fp4_linear() for _ in range(2)]
    run(modules[0], X)
    expected = [module(X) for module in modules]
    results: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        results[i] = [run(modules[i], X) for _ in range(100)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, right in zip(results, expected, strict=True):
        assert len(outs) == 100
        for out in outs:
            assert_near(out, right)
