"""The backend on a GPU: every mode, live weights under CUDA graphs, whole models."""

import logging

import pytest
import torch
import torch._inductor.cudagraph_trees
from gpu.capture import captured
from torch import nn

from marlin_w4a16 import PackedLinear, refresh
from marlin_w4a16.kernels.fp4 import E2M1_VALUES
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4

pytestmark = pytest.mark.gpu


class FP4Linear(nn.Module):
    """Decodes in forward, by table; a global scale where the format has one."""

    def __init__(self, n: int, k: int, quantize=quantize_nvfp4) -> None:
        super().__init__()
        weight = quantize(torch.randn(n, k, device="cuda") * k**-0.5)
        scales = weight.scales.view(torch.float8_e4m3fn if weight.kind == "e4m3" else torch.float8_e8m0fnu)
        self.group = weight.group
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", scales)
        self.register_buffer("global_scale", weight.multiplier[0].clone())
        self.register_buffer("values", torch.tensor(E2M1_VALUES, device="cuda"))
        self.bias = nn.Parameter(torch.randn(n, device="cuda", dtype=torch.bfloat16) * 0.1)

    def forward(self, x):
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2)
        scales = self.scales.float() * self.global_scale
        weight = (self.values[codes.int()].unflatten(-1, (-1, self.group)) * scales.unsqueeze(-1)).flatten(-2)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


def two_layers(quantize=quantize_nvfp4) -> nn.Module:
    return nn.Sequential(FP4Linear(1024, 512, quantize), nn.ReLU(), FP4Linear(200, 1024, quantize))


def near(out, expected) -> bool:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item() < 6e-3


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modes(mode, quantize, dtype, caplog):
    model = two_layers(quantize)
    compiled = torch.compile(model, backend="marlin_w4a16", mode=mode, fullgraph=True)
    with caplog.at_level(logging.INFO, "marlin_w4a16"), torch.no_grad():
        for m in (1, 16, 300):
            x = torch.randn(m, 512, device="cuda", dtype=dtype)
            for _ in range(3):
                assert near(compiled(x).clone(), model(x))
    assert all("replaced 2 of 2" in r.message and "2 Triton" in r.message for r in caplog.records) and caplog.records


def cudagraph_skips() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@torch.no_grad()
def test_reduce_overhead_replays_the_live_weights_without_skips():
    """Whole model, in-place loads, two instances of one class and a regional compile of six layers."""
    torch._dynamo.utils.counters.clear()
    first, second = two_layers(), two_layers()
    run = torch.compile(lambda model, x: model(x), backend="marlin_w4a16", mode="reduce-overhead")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    for _ in range(4):
        for model in (first, second):
            torch.compiler.cudagraph_mark_step_begin()
            assert near(run(model, x).clone(), model(x))
    first.load_state_dict(second.state_dict())
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        assert near(run(first, x).clone(), second(x))
    layers = [FP4Linear(512, 512) for _ in range(6)]
    regional = [torch.compile(layer, backend="marlin_w4a16", mode="reduce-overhead") for layer in layers]
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        y = x
        for layer, compiled in zip(layers, regional, strict=True):
            expected, y = layer(y), compiled(y).clone()
            assert near(y, expected)
    assert cudagraph_skips() == 0


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, None])
def test_reduce_overhead_replays_at_changing_batch_sizes_and_after_loads(dynamic):
    torch._dynamo.utils.counters.clear()
    model, other = two_layers(), two_layers()
    run = torch.compile(model, backend="marlin_w4a16", mode="reduce-overhead", dynamic=dynamic)
    for turn in range(4):
        for m in (1, 4, 16, 40):
            x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
            for _ in range(2):
                torch.compiler.cudagraph_mark_step_begin()
                assert near(run(x).clone(), model(x))
        if turn == 1:
            model.load_state_dict(other.state_dict())
        if turn == 2:
            model[0].codes.data.copy_(model[0].codes.roll(1, 0))
            refresh(model)
    assert cudagraph_skips() == 0


def packed_layers() -> nn.Module:
    layers = [
        PackedLinear(quantize_nvfp4(torch.randn(n, k, device="cuda") * k**-0.5)) for n, k in ((1024, 512), (512, 1024))
    ]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


@torch.no_grad()
def test_reduce_overhead_of_packed_modules_records_once():
    """Nothing to look up and nothing to record again: what is loaded in place is what replays."""
    torch._inductor.cudagraph_trees.reset_cudagraph_trees()
    torch._dynamo.utils.counters.clear()
    model, other = packed_layers(), packed_layers()
    run = torch.compile(model, backend="marlin_w4a16", mode="reduce-overhead")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    for turn in range(3):
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            assert near(run(x).clone(), model(x))
        if turn == 1:
            model.load_state_dict(other.state_dict())
    assert cudagraph_skips() == 0
    manager = torch._inductor.cudagraph_trees.get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    assert manager.new_graph_id().id == 1, "recorded more than once"


@torch.no_grad()
def test_a_captured_graph_of_packed_modules_sees_what_is_loaded_in_place():
    model, other = packed_layers(), packed_layers()
    compiled = torch.compile(model, backend="marlin_w4a16")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    compiled(x)
    graph, out = captured(lambda: compiled(x))
    graph.replay()
    assert near(out, model(x))
    model.load_state_dict(other.state_dict())
    graph.replay()
    assert near(out, other(x))


@torch.no_grad()
def test_a_captured_graph_of_the_bare_backend_keeps_its_weights_until_the_next_call():
    model, other = two_layers(), two_layers()
    for mine, its in ((model[0], other[0]), (model[2], other[2])):
        its.bias.copy_(mine.bias)  # what is not packed is read where it lies
    compiled = torch.compile(model, backend="marlin_w4a16")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    before = compiled(x)
    graph, out = captured(lambda: compiled(x))
    model.load_state_dict(other.state_dict())
    graph.replay()
    assert torch.equal(out, before) and near(compiled(x), other(x))
    graph.replay()
    assert near(out, other(x))


@torch.no_grad()
def test_a_weight_that_changed_before_capture_asks_for_a_call():
    model = FP4Linear(256, 512)
    compiled = torch.compile(model, backend="marlin_w4a16")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    compiled(x)
    refresh(model)
    with pytest.raises(RuntimeError, match="call the compiled function once before capture"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            compiled(x)
    assert near(compiled(x), model(x))


@torch.no_grad()
def test_manual_capture_and_replay():
    model = two_layers()
    compiled = torch.compile(model, backend="marlin_w4a16")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    compiled(x)
    graph, out = captured(lambda: compiled(x))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert near(out, model(x))


@torch.no_grad()
def test_a_weight_that_is_new_during_capture_asks_for_a_call_before():
    first, second = FP4Linear(256, 512), FP4Linear(256, 512)
    run = torch.compile(lambda model, x: model(x), backend="marlin_w4a16")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    run(first, x)
    with pytest.raises(RuntimeError, match="call the compiled function once before capture"):  # noqa: SIM117
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            run(second, x)


def test_dynamic_token_counts_compile_once(caplog):
    model = two_layers()
    compiled = torch.compile(model, backend="marlin_w4a16", fullgraph=True)
    with caplog.at_level(logging.INFO, "marlin_w4a16"):
        for m in (5, 16, 33, 300, 2100):
            x = torch.randn(m, 512, device="cuda", dtype=torch.bfloat16)
            torch._dynamo.mark_dynamic(x, 0)
            assert near(compiled(x), model(x))
    assert len(caplog.records) == 1


def test_a_training_step_has_the_gradients_of_eager():
    norm, base = nn.RMSNorm(512, device="cuda"), FP4Linear(256, 512)
    down, up = (nn.Linear(a, b, bias=False, device="cuda") for a, b in ((512, 8), (8, 256)))

    def step(x):
        y = norm(x)
        return (base(y) + up(down(y))).float().square().mean()

    x, trained = torch.randn(64, 512, device="cuda"), [norm.weight, down.weight, up.weight, base.bias]
    eager = torch.autograd.grad(step(x), trained)
    compiled = torch.autograd.grad(torch.compile(step, backend="marlin_w4a16")(x), trained)
    for found, expected in zip(compiled, eager, strict=True):
        assert ((found.float() - expected.float()).norm() / expected.float().norm()).item() < 1e-2


def test_other_capabilities_are_left_alone(monkeypatch):
    from marlin_w4a16.kernels.target import Target
    from marlin_w4a16.passes.devices import serves
    from marlin_w4a16.passes.outcome import Rejected

    for capability, word in (((10, 0), "FP4 tensor cores"), ((12, 0), "FP4 tensor cores"), ((7, 5), "need 8.0")):
        monkeypatch.setattr(Target, "of", lambda _, c=capability: Target(c, 1))
        served = serves(torch.device("cuda"))
        assert isinstance(served, Rejected) and word in served.reason
