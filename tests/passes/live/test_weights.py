"""Never another weight's result: a compiled graph runs with the weights of the call, whatever happened to them."""

import copy
import gc
import io
import operator
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import quantize_mxfp4, quantize_nvfp4, refresh
from marlin_w4a16.passes.live import binding
from marlin_w4a16.passes.mixture.stacks import pack_stack

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request, monkeypatch, fp4_linear) -> str:
    """Where the models of a test and the input X are."""
    monkeypatch.setattr(fp4_linear, "device", request.param)
    monkeypatch.setitem(globals(), "X", X.to(request.param))
    return request.param


def compiled(function):
    return torch.compile(function, backend="marlin_w4a16", fullgraph=True)


@pytest.mark.parametrize("how", ["function", "method"])
def test_two_instances_through_one_compiled_function(fp4_linear, assert_near, levels, how):
    run = compiled((lambda module, x: module(x)) if how == "function" else fp4_linear.forward)
    a, b = fp4_linear(), fp4_linear()
    for module in (a, b, a, b, b):
        assert_near(run(module, X), module(X))
    assert levels() == ["INFO"]


def test_layers_compiled_one_by_one(fp4_linear, assert_near, levels):
    model = nn.Sequential(*(fp4_linear(64, 64) for _ in range(3)))
    expected = model(X)
    for layer in model:
        layer.compile(backend="marlin_w4a16", fullgraph=True)
    for _ in range(2):
        assert_near(model(X), expected)
    assert levels() == ["INFO"]


def test_layers_after_a_graph_break(fp4_linear, assert_near, levels):
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
    assert set(levels()) == {"INFO"}


def in_inference_mode(module, other):
    with torch.inference_mode():
        module.codes.copy_(other.codes)


def data_while_the_old_memory_lives(module, other):
    module.old = module.codes.data
    module.codes.data = other.codes.clone()


def exchanged_parameters(module, other):
    module.codes, other.codes = other.codes, module.codes


CHANGES = {
    "load_state_dict": lambda module, other: module.load_state_dict(other.state_dict()),
    "assign_state_dict": lambda module, other: module.load_state_dict(other.state_dict(), assign=True),
    "copy_": lambda module, other: module.codes.copy_(other.codes),
    "fill_": lambda module, other: module.scales.fill_(0x40),
    "data_copy_of_scales": lambda module, other: setattr(module.scales, "data", other.scales.data),
    "data": lambda module, other: setattr(module.codes, "data", other.codes.clone()),
    "data_while_the_old_memory_lives": data_while_the_old_memory_lives,
    "through_a_view": lambda module, other: operator.setitem(module.codes[3:5].view(-1), slice(None, None, 2), 0x21),
    "in_inference_mode": in_inference_mode,
    "new_parameter": lambda module, other: setattr(module, "codes", nn.Parameter(other.codes.clone(), False)),
    "exchanged_parameters": exchanged_parameters,
    "factor": lambda module, other: module.factor.mul_(3),
    "new_factor": lambda module, other: setattr(module, "factor", module.factor * 3),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_a_changed_weight(fp4_linear, assert_near, levels, change, quantize):
    module = fp4_linear(quantize=quantize)
    run = compiled(module)
    before = run(X)
    assert_near(before, module(X))
    with torch.no_grad():
        change(module, fp4_linear(quantize=quantize))
    for _ in range(2):
        after = run(X)
        assert_near(after, module(X))
    assert (after - before).norm() > 0.01 * before.norm() and levels() == ["INFO"]


def flat(module) -> None:
    """The codes become a view of a buffer that is written to instead of them, as FSDP1, ZeRO and apex do it."""
    module.buffer = [module.codes.detach().flatten().clone()]
    module.codes.data = module.buffer[0].view(module.codes.shape)


def preserving_the_version(module, other):
    """As FSDP2 gathers the parts of a parameter."""
    with torch.autograd._unsafe_preserve_version_counter(module.codes):
        module.codes.copy_(other.codes)


UNSEEN = {
    "data_in_place": lambda module, other: module.codes.data.copy_(other.codes),
    "flat_buffer": lambda module, other: module.buffer[0].copy_(other.codes.flatten()),
    "dlpack": lambda module, other: torch.from_dlpack(module.codes.detach()).copy_(other.codes),
    "preserving_the_version": preserving_the_version,
    "numpy_view": lambda module, other: operator.setitem(
        module.codes.detach().numpy(), slice(None), other.codes.numpy()
    ),
    "factor_in_place": lambda module, other: module.factor.data.mul_(3),
}


@pytest.mark.parametrize("change", UNSEEN)
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_a_write_that_nothing_sees_is_seen_after_refresh(
    fp4_linear, assert_near, levels, device, change, made_in_inference_mode
):
    if change == "numpy_view" and device != "cpu":
        pytest.skip("numpy has no views of GPU memory")
    if change == "preserving_the_version" and made_in_inference_mode:
        pytest.skip("inference tensors have none")
    with torch.inference_mode(made_in_inference_mode):
        model = nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))
        flat(model[1])
        run = compiled(model)
        before = run(X)
        UNSEEN[change](model[1], fp4_linear(64, 64))
        refresh(run)
        for _ in range(2):
            after = run(X)
            assert_near(after, model(X))
        assert (after - before).norm() > 0.01 * before.norm()
    assert levels() == ["INFO"]


def test_refresh_of_one_part_packs_that_part_again(fp4_linear, monkeypatch):
    model = nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))
    run = compiled(model)
    run(X)
    packed = []
    monkeypatch.setattr(binding, "pack_stack", lambda weight, batch, order, into: packed.append(weight.name))
    refresh(model[1])
    run(X)
    assert packed == ["1.codes"]


@pytest.mark.parametrize("held_as", ["buffers", "attributes"])
def test_refresh_reaches_buffers_and_plain_attributes(fp4_linear, assert_near, held_as):
    module = fp4_linear()
    for name in ("codes", "scales", "factor", "table"):
        value = getattr(module, name).detach().clone()
        delattr(module, name)
        if held_as == "buffers":
            module.register_buffer(name, value)
        else:
            setattr(module, name, value)
    run = compiled(module)
    run(X)
    module.factor.data.mul_(3)
    refresh(module)
    assert_near(run(X), module(X))


def test_memory_that_comes_back_with_other_values(fp4_linear, assert_near, device):
    """Freed and given to the next weight, as an allocator does: the same tensor, address and version."""
    if device != "cpu":
        pytest.skip("only memory of the CPU can be given out by hand")
    module = fp4_linear()
    memory = torch.empty(module.codes.numel(), dtype=torch.uint8)

    def at_one_address(codes: Tensor) -> Tensor:
        storage = torch.frombuffer(memory.numpy(), dtype=torch.uint8)
        storage.copy_(codes.flatten())
        return storage.view_as(codes)

    module.codes.data = at_one_address(module.codes)
    run = compiled(module)
    run(X)
    state = module.codes.data_ptr(), module.codes._version
    module.codes.data = torch.empty(0, dtype=torch.uint8)
    module.codes.data = at_one_address(fp4_linear().codes)
    assert state == (module.codes.data_ptr(), module.codes._version)
    assert_near(run(X), module(X))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_model_that_was_compiled(fp4_linear, assert_near, levels, how):
    run, module = compiled(lambda module, x: module(x)), fp4_linear()
    run(module, X)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    module.codes.copy_(fp4_linear().codes)
    for instance in (twin, module, twin):
        assert_near(run(instance, X), instance(X))
    assert (run(twin, X) - run(module, X)).norm() > 0.01 and levels() == ["INFO"]


def copies() -> int:
    gc.collect()
    return len(binding._COPIES)


@torch.no_grad()
def test_the_graphs_of_a_model_share_its_packed_weights(fp4_linear, assert_near, levels, monkeypatch):
    """A graph for each shape, one of another function, and one that uses a weight in another way."""
    model = nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))
    run = torch.compile(model, backend="marlin_w4a16", dynamic=False)
    other = torch.compile(lambda x: model(x) + 1, backend="marlin_w4a16")
    turned = compiled(lambda x: x @ model[0].weight().T)
    for tokens in (3, 5, 7):
        assert_near(run(X[:1].expand(tokens, 64)), model(X[:1].expand(tokens, 64)))
    assert_near(other(X), model(X) + 1)
    assert_near(turned(X), X @ model[0].weight().T)
    assert len(levels()) == 5 and copies() == 2
    packed = []
    monkeypatch.setattr(binding, "pack_stack", lambda *args: packed.append(1) or pack_stack(*args))
    model[0].codes.copy_(fp4_linear(64, 64).codes)
    assert_near(run(X[:1].expand(5, 64)), model(X[:1].expand(5, 64)))
    assert_near(turned(X), X @ model[0].weight().T)
    assert_near(other(X), model(X) + 1)
    assert copies() == 2 and len(packed) == 1


def test_another_table_of_the_same_values_is_verified_and_nothing_is_packed(fp4_linear, assert_near, monkeypatch):
    module = fp4_linear()
    run = compiled(module)
    before = run(X)
    monkeypatch.setattr(binding, "pack_stack", None)
    module.table = module.table.clone()
    assert torch.equal(run(X), before) and copies() == 1


def test_packed_weights_live_as_long_as_the_model(fp4_linear):
    run = compiled(lambda module, x: module(x))
    first, second = fp4_linear(), fp4_linear()
    run(first, X)
    run(second, X)
    assert copies() == 2
    del first
    gc.collect()
    assert copies() == 1
    run(second, X)
    assert copies() == 1


def test_packed_weights_live_as_long_as_the_compiled_function(fp4_linear):
    module = fp4_linear()
    run = compiled(module)
    run(X)
    assert copies() == 1
    del run
    torch._dynamo.reset()
    gc.collect()
    assert copies() == 0 and module(X) is not None


def test_a_weight_that_is_no_longer_fp4_runs_eagerly_and_says_so_once(fp4_linear, levels):
    module = fp4_linear()
    run = compiled(module)
    run(X)
    table = module.table.clone()
    module.table[3] = 1.4
    for _ in range(3):
        assert torch.equal(run(X), module(X))
    assert levels() == ["INFO", "WARNING"]
    module.table.copy_(table)
    torch.testing.assert_close(run(X), module(X), rtol=1e-4, atol=1e-4)
    assert levels() == ["INFO", "WARNING"]


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_that_moves_to_another_device_and_back(fp4_linear, assert_near, device):
    other, model = "cpu" if device == "cuda" else "cuda", nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))
    run = compiled(model)
    for i, place in enumerate((device, other, device, other, device)):
        model.to(place)
        if i > 1:
            model[0].codes.copy_(model[0].codes.roll(i, 0))
            model[1].factor.data = model[1].factor * 1.5
        for _ in range(2):
            assert_near(run(X.to(place)), model(X.to(place)))
    assert copies() == 2


def test_an_instance_that_is_no_fp4_does_not_disturb_one_that_is(fp4_linear, assert_near, levels):
    run = compiled(lambda module, x: module(x))
    good, bad = fp4_linear(), fp4_linear()
    bad.scales.data[0, 0] = 0x7F
    for module in (good, bad, good, bad):
        found, expected = run(module, X), module(X)
        assert torch.equal(found.isnan(), expected.isnan())
        assert_near(found.nan_to_num(), expected.nan_to_num())
    assert levels() == ["INFO", "WARNING"]


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_a_weight_of_zeros_that_is_loaded_later(fp4_linear, assert_near, levels, quantize):
    source = fp4_linear(quantize=quantize)
    module = copy.deepcopy(source)
    for tensor in (module.codes, module.scales):
        tensor.zero_()
    run = compiled(module)
    assert torch.equal(run(X), X.new_zeros(3, 48))
    module.load_state_dict(source.state_dict())
    assert_near(run(X), source(X))
    module.factor.mul_(3)
    assert_near(run(X), module(X))
    assert levels() == ["INFO"]


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
            out = run(X.clone().requires_grad_())
            assert out.requires_grad == grad
            assert_near(out.detach(), module(X))
        module.codes.data = module.codes.roll(1, 0)


def test_threads_that_call_two_instances_at_once(fp4_linear, assert_near):
    run, modules = compiled(lambda module, x: module(x)), [fp4_linear() for _ in range(2)]
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
