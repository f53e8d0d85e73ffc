"""Calls that are replayed on a GPU: the bits of the general way, and everything else sees what it saw before."""

import itertools

import pytest
import torch
from gpu.capture import captured
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import marlin_w4a16
from marlin_w4a16 import Activation, PackedExperts, PackedLinear, pack, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.kernels import grad_input as gradients
from marlin_w4a16.kernels import linear as linears
from marlin_w4a16.kernels import moe as mixtures
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4

pytestmark = pytest.mark.gpu

TOKENS = (1, 2, 8, 9, 16, 17, 64, 100, 129, 300, 2100)
BF16 = torch.bfloat16


def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=dtype, device="cuda")


def packed_weight(n: int, k: int, quantise=quantize_nvfp4) -> PackedFP4:
    return pack(quantise(random(n, k, dtype=torch.float32) / 32))


def stack(experts: int, n: int, k: int) -> FP4Weight:
    weight = quantize_nvfp4(random(experts * n, k, dtype=torch.float32) / 32)
    parts = (weight.codes, weight.scales, weight.multiplier)
    return FP4Weight(*(t.unflatten(0, (experts, n)) for t in parts), weight.kind, weight.group)


def op(x: Tensor, packed: PackedFP4, bias: Tensor | None = None) -> Tensor:
    return torch.ops.marlin_w4a16.linear(x, *weight_args(packed), bias)


def calls(code: str) -> dict[str, int]:
    """How often what Inductor wrote calls launches, and ops of this library."""
    lines = [line.strip() for line in code.splitlines() if not line.strip().startswith("#")]
    names = {"linear_into", "grad_input_into", "moe_into"}
    found = {name: sum(line.startswith(f"{name}(") for line in lines) for name in names}
    counted = {name: count for name, count in found.items() if count}
    return counted | {"torch.ops": sum("torch.ops.marlin_w4a16" in line for line in lines)}


class Seen(TorchDispatchMode):
    """The ops of this library that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "marlin_w4a16":
            self.ops.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def general(monkeypatch):
    """Counts the calls that ran in the general way."""
    counted: list[object] = []
    for module in (linears, gradients, mixtures):
        choose = module._choose
        monkeypatch.setattr(module, "_choose", lambda *args, run=choose: (counted.append(args), run(*args))[1])
    return counted


@pytest.mark.parametrize("quantise", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("n, k", [(1088, 2048), (200, 1120), (512, 16384)])
def test_linears_have_the_bits_of_the_general_way(n, k, dtype, quantise):
    packed, bias = packed_weight(n, k, quantise), random(n, dtype=dtype)
    for m, row in itertools.product(TOKENS, (None, bias)):
        for _ in range(3):
            x = random(m, k, dtype=dtype)
            assert torch.equal(marlin_w4a16.linear(x, packed, row), linears.linear(x, packed, row))


def test_a_replay_writes_every_element_of_its_output_and_reads_none_of_its_scratch(poisoned):
    packed = packed_weight(1088, 2048)
    for m in TOKENS:
        for _ in range(3):
            x = random(m, 2048)
            out = marlin_w4a16.linear(x, packed)
            assert not out.isnan().any()
            assert torch.equal(out, linears.linear(x, packed))


def test_a_weight_elsewhere_is_that_of_the_call():
    packed = [packed_weight(256, 512) for _ in range(3)]
    x = random(20, 512)
    for one in packed * 2:
        assert torch.equal(marlin_w4a16.linear(x, one), linears.linear(x, one))


@pytest.mark.parametrize("m", [1, 20, 300])
def test_only_the_first_call_of_a_shape_runs_in_the_general_way(m, general):
    packed = packed_weight(192, 576)
    for _ in range(5):
        marlin_w4a16.linear(random(m, 576), packed)
    assert len(general) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
        lambda x: x.view(5, 4, -1).expand(5, 4, -1),
        lambda x: x.view(5, 1, 4, -1),
    ],
    ids=["strided", "transposed", "off the grid", "three axes", "four axes"],
)
def test_inputs_of_any_strides_and_axes(change):
    packed, x = packed_weight(192, 576), random(20, 576)
    expected = linears.linear(x, packed)
    for _ in range(3):
        changed = change(x)
        out = marlin_w4a16.linear(changed, packed)
        assert out.shape == (*changed.shape[:-1], 192)
        assert torch.equal(out.reshape(20, 192), expected)


def test_a_bias_off_the_grid():
    packed, x, row = packed_weight(192, 576), random(20, 576), random(193)
    for bias in (row[:192], row[1:], row[:192]):
        assert torch.equal(marlin_w4a16.linear(x, packed, bias), linears.linear(x, packed, bias))


def test_another_bias_at_the_address_of_one_that_is_gone():
    packed, x, memory = packed_weight(192, 576), random(20, 576), torch.zeros(768, dtype=torch.uint8, device="cuda")
    for dtype in (torch.float32, BF16, torch.float32, torch.float16):
        bias = memory.view(dtype)[:192].normal_()
        for _ in range(2):
            assert torch.equal(marlin_w4a16.linear(x, packed, bias), linears.linear(x, packed, bias))


def test_mixtures_have_the_bits_of_the_general_way(general):
    for biases in (False, True):
        first, second = stack(16, 256, 512), stack(16, 512, 128)
        bias13, bias2 = (random(16, 256), random(16, 512)) if biases else (None, None)
        module = PackedExperts(first, second, Activation(), "gate_up", bias13, bias2)
        experts = Experts(module.w13, module.w2, module.activation, module.bias13, module.bias2)
        for tokens in (1, 3, 30, 200):
            before = len(general)
            for _ in range(3):
                x = random(tokens, 512)
                weights, ids = random(tokens, 16).softmax(-1).topk(4)
                assert torch.equal(module(x, ids, weights), mixtures.moe(x, experts, weights, ids, None))
            assert len(general) - before == 1 + 3  # the first of the module, and those of the general way


@pytest.mark.parametrize("m", [1, 64, 300])
def test_replays_in_a_graph_and_on_two_streams_at_once(m):
    packed, (x, y) = packed_weight(1088, 2048), (random(m, 2048) for _ in range(2))
    marlin_w4a16.linear(x, packed)
    graphs = [captured(lambda z=z: marlin_w4a16.linear(z, packed)) for z in (x, y)]
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        x.normal_(), y.normal_()
        torch.cuda.synchronize()
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = []
        for z, stream in zip((x, y), streams, strict=True):
            with torch.cuda.stream(stream):
                eager.append(marlin_w4a16.linear(z, packed))
        torch.cuda.synchronize()
        for (_, out), z, mine in zip(graphs, (x, y), eager, strict=True):
            expected = linears.linear(z, packed)
            assert torch.equal(out, expected) and torch.equal(mine, expected)


def test_modes_autocast_and_profilers_see_the_op():
    packed, x = packed_weight(192, 576), random(20, 576)
    expected = marlin_w4a16.linear(x, packed)
    with Seen() as seen:
        assert torch.equal(marlin_w4a16.linear(x, packed), expected)
    assert seen.ops == ["marlin_w4a16::linear"]
    with torch.autocast("cuda", torch.bfloat16):
        assert marlin_w4a16.linear(x.float(), packed).dtype == BF16
    with torch.profiler.profile() as profile:
        marlin_w4a16.linear(x, packed)
    assert any(event.key == "marlin_w4a16::linear" for event in profile.key_averages())
    mapped = torch.vmap(lambda row: marlin_w4a16.linear(row, packed))(x)
    assert (mapped.double() - expected.double()).norm() <= 4e-3 * expected.double().norm()


def test_hooks_of_triton_see_every_launch():
    from triton import knobs

    packed, x, seen = packed_weight(192, 576), random(20, 576), []
    marlin_w4a16.linear(x, packed)
    note = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(note)
    try:
        marlin_w4a16.linear(x, packed)
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    assert seen[0] == "_stream_kernel"


@pytest.mark.parametrize("name", ["words", "scales", "multiplier"])
@pytest.mark.parametrize(
    "change",
    [lambda t: t[:0], lambda t: t.cpu(), lambda t: t.flatten()[:-1], lambda t: t.double()],
    ids=["shorter", "on the CPU", "another shape", "another dtype"],
)
def test_a_weight_that_was_changed_is_refused(name, change):
    packed, x = packed_weight(192, 576), random(20, 576)
    marlin_w4a16.linear(x, packed)
    tensor = getattr(packed, name)
    kept, tensor.data = tensor.data, change(tensor.data)
    with pytest.raises(ValueError, match=rf"marlin_w4a16::linear: {name}: found"):
        marlin_w4a16.linear(x, packed)
    tensor.data = kept
    assert torch.equal(marlin_w4a16.linear(x, packed), linears.linear(x, packed))


@pytest.mark.parametrize(
    "x", [lambda: random(4, 575), lambda: random(4, 576).int(), lambda: random(4, 576).cpu(), lambda: random(0, 576)]
)
def test_inputs_that_do_not_fit_are_the_ops_matter(x):
    packed, x = packed_weight(192, 576), x()
    if len(x):
        with pytest.raises(ValueError, match="marlin_w4a16::linear: "):
            marlin_w4a16.linear(x, packed)
    else:
        assert marlin_w4a16.linear(x, packed).shape == (0, 192)


@pytest.mark.parametrize("m", [1, 20, 300])
@pytest.mark.parametrize("trained", [False, True], ids=["a bias that stays", "a bias that is trained"])
def test_gradients_are_those_of_the_op(m, trained):
    packed, bias = packed_weight(192, 576), nn.Parameter(random(192), requires_grad=trained)
    found = []
    for call in (marlin_w4a16.linear, op):
        torch.manual_seed(0)
        x = random(m, 576).requires_grad_()
        call(x, packed, bias).square().sum().backward()
        found.append((x.grad, bias.grad))
        bias.grad = None
    (x, row), (expected, of_row) = found
    assert torch.equal(x, expected)
    assert (row is None and of_row is None) or torch.equal(row, of_row)


@pytest.mark.parametrize("n, k", [(192, 576), (1088, 2048), (100, 96), (2880, 1000)], ids=str)
def test_gradients_have_the_bits_of_the_general_way(n, k, general, poisoned):
    for quantise, m in itertools.product((quantize_nvfp4, quantize_mxfp4), (1, 20, 200, 256, 300, 2100)):
        if k % 32:
            quantise = lambda weight: quantize_nvfp4(nn.functional.pad(weight, (0, -weight.shape[1] % 16)))  # noqa: E731
        packed = packed_weight(n, k, quantise)
        x = random(m, packed.k).requires_grad_()
        for _ in range(4):
            grad, x.grad = random(m, n), None
            marlin_w4a16.linear(x, packed).backward(grad)
            expected = gradients.linear_grad_input(grad, packed)
            assert torch.equal(x.grad, expected)
            assert torch.equal(torch.ops.marlin_w4a16.linear_grad_input(grad, *weight_args(packed)), expected)


@pytest.mark.parametrize("m", [1, 200, 300])
def test_only_the_first_gradient_of_a_shape_runs_in_the_general_way(m, general):
    packed = packed_weight(256, 640)
    for _ in range(5):
        marlin_w4a16.linear(random(m, 640).requires_grad_(), packed).backward(random(m, 256))
    assert len(general) == 2  # one forward and one backward


def test_gradients_of_any_strides_and_of_graphs():
    packed = packed_weight(256, 640)
    for m in (20, 300):
        x = random(m, 640).requires_grad_()
        marlin_w4a16.linear(x, packed).sum().backward()  # of one element that is expanded
        expected = gradients.linear_grad_input(torch.ones(m, 256, dtype=BF16, device="cuda"), packed)
        assert torch.equal(x.grad, expected)
        grad = random(m, 256)
        graph, out = captured(lambda x=x, grad=grad: torch.autograd.grad(marlin_w4a16.linear(x, packed), x, grad)[0])
        for _ in range(3):
            grad.normal_()
            graph.replay()
            assert torch.equal(out, gradients.linear_grad_input(grad, packed))


def test_a_backward_on_another_stream_and_thread():
    packed, stream = packed_weight(1088, 2048), torch.cuda.Stream()
    for _ in range(20):
        x, grad = random(300, 2048).requires_grad_(), random(300, 1088)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = marlin_w4a16.linear(x, packed)
            out.backward(grad)
        stream.synchronize()
        assert torch.equal(x.grad, gradients.linear_grad_input(grad, packed))


def test_ops_that_are_called_as_such_are_replayed(general):
    packed, x = packed_weight(320, 448), random(20, 448)  # a shape of its own: calls are kept for the process
    for _ in range(4):
        assert torch.equal(op(x, packed), op(x.clone(), packed))
        torch.ops.marlin_w4a16.linear_grad_input(random(20, 320), *weight_args(packed))
    assert len(general) == 2


def test_recomputed_activations_where_a_profiler_saw_one_of_the_two():
    packed, x = packed_weight(192, 576), random(20, 576).requires_grad_()
    with torch.profiler.profile():
        out = checkpoint(lambda y: marlin_w4a16.linear(y, packed).relu(), x, use_reentrant=False)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_gradients_can_be_differentiated_again():
    packed, x = packed_weight(64, 64), random(4, 64).requires_grad_()
    (grad,) = torch.autograd.grad(marlin_w4a16.linear(x, packed).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    dense = packed.unpack().decode().to(x)
    y = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((y @ dense.double().T).square().sum(), y, create_graph=True)
    expected.square().sum().backward()
    assert (x.grad.double() - y.grad).norm() <= 2e-2 * y.grad.norm()


@pytest.mark.parametrize("backend", ["marlin_w4a16", "inductor"])
def test_what_inductor_writes_calls_the_launches(backend):
    model = nn.Sequential(PackedLinear(quantize_nvfp4(random(512, 512).float())), nn.SiLU())
    model.append(PackedLinear(quantize_nvfp4(random(64, 512).float()), random(64)))
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        x = random(20, 512)
        out, (code,) = run_and_get_code(compiled, x)
        assert torch.equal(out, model(x))
    assert calls(code) == {"linear_into": 2, "torch.ops": 0}


@pytest.mark.parametrize("m", [20, 300])
def test_compiled_gradients_call_the_launches(m):
    torch._dynamo.reset()
    module = PackedLinear(quantize_nvfp4(random(512, 640).float()))
    x, grad = random(m, 640), random(m, 512)

    def step(call):
        y = x.clone().requires_grad_()
        call(torch.nn.functional.silu(y)).backward(grad)
        return y.grad

    compiled = torch.compile(module, backend="marlin_w4a16")
    found, codes = run_and_get_code(step, compiled)
    assert torch.equal(found, step(module))
    assert [calls(code) for code in codes] == [
        {"linear_into": 1, "torch.ops": 0},
        {"grad_input_into": 1, "torch.ops": 0},
    ]


def test_compiled_autograd_gives_the_same():
    packed, grad = packed_weight(192, 576), random(20, 192)
    for _ in range(3):
        x = random(20, 576).requires_grad_()
        out = marlin_w4a16.linear(x, packed)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            out.backward(grad)
        assert torch.equal(x.grad, gradients.linear_grad_input(grad, packed))


def test_recomputed_activations():
    module = nn.Sequential(PackedLinear(quantize_nvfp4(random(512, 512).float())), nn.SiLU())
    for _ in range(3):
        x, grads = random(20, 512), []
        for call in (module, lambda y: checkpoint(module, y, use_reentrant=False)):
            y = x.clone().requires_grad_()
            call(y).sum().backward()
            grads.append(y.grad)
        assert torch.equal(*grads)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_of_any_number_of_tokens(dynamic):
    torch._dynamo.reset()
    module = PackedLinear(quantize_nvfp4(random(512, 512).float()), random(512))
    compiled = torch.compile(module, backend="marlin_w4a16", dynamic=dynamic)
    with torch.no_grad():
        for m in (1, 17, 300, 0):
            x = random(m, 512)
            assert torch.equal(compiled(x), module(x))
            wide = random(m, 1024)[:, 256:768]
            assert torch.equal(compiled(wide), module(wide))


def test_compiled_mixtures_call_the_launches():
    torch._dynamo.reset()
    module = PackedExperts(stack(16, 256, 512), stack(16, 512, 128), Activation(gate_limit=7.0), "gate_up")
    x = random(30, 512)
    weights, ids = random(30, 16).softmax(-1).topk(4)
    with torch.no_grad():
        out, (code,) = run_and_get_code(torch.compile(module, backend="marlin_w4a16"), x, ids, weights)
        assert torch.equal(out, module(x, ids, weights))
    assert calls(code) == {"moe_into": 1, "torch.ops": 0}
