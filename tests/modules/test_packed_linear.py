import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import marlin_w4a16.backend
from marlin_w4a16 import FP4Weight, PackedLinear, explain, pack, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.outcome import Owned
from marlin_w4a16.report.table import size
from modules.state import addresses, assert_same, bits
from weights import equal

OP = torch.ops.marlin_w4a16.linear.default
N, K = 48, 96  # neither fills its tiles
X = torch.linspace(-1, 1, 5 * K).view(5, K)
PACKED = ("multiplier", "words", "scales")
QUANTISERS = (quantize_nvfp4, quantize_mxfp4)


@pytest.fixture(params=QUANTISERS)
def quantise(request) -> Callable[[Tensor], FP4Weight]:
    return request.param


@pytest.fixture
def weight(quantise) -> FP4Weight:
    return quantise(torch.randn(N, K))


@pytest.fixture
def linear(weight) -> PackedLinear:
    return PackedLinear(weight, torch.randn(N))


def another(linear: PackedLinear) -> PackedLinear:
    """A module of the same format and shape with another weight and bias."""
    quantise = quantize_nvfp4 if linear.packed.kind == "e4m3" else quantize_mxfp4
    return PackedLinear(quantise(torch.randn(linear.out_features, linear.in_features)), torch.randn(N))


def wide() -> FP4Weight:
    """A row of it spans more powers of two than float16 has."""
    dense = torch.randn(N, K)
    dense[:, :32] *= 2.0**-60
    return quantize_mxfp4(dense)


@pytest.mark.parametrize("bias", [torch.randn(N), None], ids=["bias", "no bias"])
@pytest.mark.parametrize("packs", [pack, lambda weight: weight], ids=["packed", "canonical"])
def test_it_is_the_product_with_the_exact_decode(weight, bias, packs, assert_near):
    module = PackedLinear(packs(weight), bias)
    expected = nn.functional.linear(X.double(), weight.decode(), None if bias is None else bias.double())
    assert_near(module(X), expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_of_16_bits_and_any_leading_shape(weight, dtype, assert_near):
    x = X.to(dtype).view(5, 1, K).expand(5, 2, K)
    expected = nn.functional.linear(x.double(), weight.decode())
    assert_near(PackedLinear(weight)(x), expected.to(dtype))


def test_packed_tensors_are_taken_as_they_are(weight):
    packed = pack(weight)
    module = PackedLinear(packed)
    for name in PACKED:
        for found in (getattr(module, name), getattr(module.packed, name)):
            assert found.data_ptr() == getattr(packed, name).data_ptr()


def test_a_loaded_state_writes_the_multiplier_last(linear):
    """A kernel of the GPU may read words and scales before the one before it has ended."""

    class Written(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op._schema.is_mutable:
                into.append(args[0].data_ptr())
            return op(*args, **(kwargs or {}))

    state, into = bits(linear), []
    with Written():
        linear.load_state_dict(state)
    assert into[-1] == linear.multiplier.data_ptr()
    assert_same(bits(linear), state)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_bias_that_is_a_parameter_keeps_its_identity(weight, requires_grad):
    bias = nn.Parameter(torch.randn(N), requires_grad=requires_grad)
    assert PackedLinear(weight, bias).bias is bias and bias.requires_grad == requires_grad


def test_a_bias_that_is_a_tensor_becomes_a_frozen_parameter(weight):
    bias = torch.randn(N)
    module = PackedLinear(weight, bias)
    assert module.bias.data_ptr() == bias.data_ptr() and not module.bias.requires_grad


@pytest.mark.parametrize(
    "quantise, text",
    [
        (quantize_nvfp4, "PackedLinear(in_features=96, out_features=48, bias=True, NVFP4 group 16, 4.7 KiB)"),
        (quantize_mxfp4, "PackedLinear(in_features=96, out_features=48, bias=True, MXFP4 group 32, 4.4 KiB)"),
    ],
)
def test_its_repr(linear, text):
    assert repr(linear) == text and (linear.in_features, linear.out_features) == (K, N)


def test_its_repr_without_a_bias(weight):
    assert "bias=False" in repr(PackedLinear(weight))


def test_every_code_and_scale_comes_back(weight, linear):
    found = linear.to_fp4("up")
    assert equal(found, weight) and found.name == "up"


def test_what_float16_needed_shifted_decodes_to_the_same_values():
    weight = quantize_mxfp4(torch.randn(N, K) * 2.0**-30)
    fitted = PackedLinear(weight).to_fp4()
    assert torch.equal(fitted.decode(), weight.decode())
    assert weight.fit(torch.float16) is not weight and fitted.fit(torch.float16) is fitted


def test_what_only_bfloat16_holds_is_taken_by_default(assert_near):
    weight, x = wide(), X.bfloat16()
    expected = nn.functional.linear(x.double(), weight.decode()).bfloat16()
    assert_near(PackedLinear(weight)(x), expected)


def test_what_only_bfloat16_holds_is_refused_for_float16():
    with pytest.raises(ValueError, match="powers of two"):
        PackedLinear(wide(), dtype=torch.float16)


@pytest.mark.parametrize("experts, n", [(2, 64), (64, 16)])
@pytest.mark.parametrize("packs", [pack, lambda weight: weight], ids=["packed", "canonical"])
def test_three_dimensions_are_refused(quantise, experts, n, packs):
    one = quantise(torch.randn(n, 64))
    tensors = (t.expand(experts, *t.shape).contiguous() for t in (one.codes, one.scales, one.multiplier))
    weight = packs(FP4Weight(*tensors, one.kind, one.group))
    with pytest.raises(ValueError, match="PackedLinear: found a weight of 3 dimensions, expected 2"):
        PackedLinear(weight)


def test_a_call_changes_no_parameter(linear):
    before, versions = bits(linear), [p._version for p in linear.parameters()]
    linear(X.clone().requires_grad_()).sum().backward()
    linear(X.bfloat16())
    assert_same(linear.state_dict(), before)
    assert [p._version for p in linear.parameters()] == versions
    assert all(p.grad is None for p in linear.parameters())


# State dicts


def test_the_state_says_how_it_is_packed(linear):
    state = linear.state_dict()["_extra_state"]
    packed = linear.packed
    assert state.dtype == torch.uint8
    assert json.loads(bytes(state.tolist())) == {
        "layout": packed.layout, "kind": packed.kind, "group": packed.group, "n": N, "k": K,
    }  # fmt: skip


def through_torch(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    torch.save(state, file)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file, save_file

    save_file(state, file)
    return load_file(file)


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assign"])
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
def test_a_state_goes_through_a_file(linear, through, assign, tmp_path):
    state = through(linear.state_dict(), tmp_path / "state")
    other = another(linear)
    other.load_state_dict(state, assign=assign)
    assert_same(other.state_dict(), linear.state_dict())
    assert torch.equal(other(X), linear(X))


def test_loading_in_place_keeps_addresses(linear):
    before, state = addresses(linear), another(linear).state_dict()
    linear.load_state_dict(state)
    assert addresses(linear) == before
    assert_same(linear.state_dict(), state)


def test_assigning_takes_the_tensors_of_the_state(linear):
    source = another(linear)
    linear.load_state_dict(source.state_dict(), assign=True)
    assert addresses(linear) == addresses(source) and not any(p.requires_grad for p in linear.parameters())


OTHERS = {
    "kind": lambda: PackedLinear(quantize_mxfp4(torch.randn(N, K)), torch.randn(N)),
    "group": lambda: PackedLinear(quantize_nvfp4(torch.randn(N, K), 16), torch.randn(N)),
    "rows": lambda: PackedLinear(quantize_nvfp4(torch.randn(N + 1, K), 32), torch.randn(N + 1)),
    "columns": lambda: PackedLinear(quantize_nvfp4(torch.randn(N, K - 32), 32), torch.randn(N)),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_format_or_shape_is_refused_and_nothing_is_overwritten(other, strict):
    model = nn.Sequential(PackedLinear(quantize_nvfp4(torch.randn(N, K), 32), torch.randn(N)))
    source, before = other(), bits(model)
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(nn.Sequential(source).state_dict(), strict=strict)
    for text in (f"0: found a weight packed as {source._packing}, expected {model[0]._packing}", "to_fp4()"):
        assert text in str(caught.value)
    assert_same(model.state_dict(), before)


def test_a_state_of_another_layout_is_refused_and_nothing_is_overwritten(linear):
    state, before = another(linear).state_dict(), bits(linear)
    packing = json.loads(bytes(state["_extra_state"].tolist())) | {"layout": "tile32"}
    state["_extra_state"] = torch.tensor(list(json.dumps(packing).encode()), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"PackedLinear: found .*'tile32'.*, expected .*'tile64'"):
        linear.load_state_dict(state)
    assert_same(linear.state_dict(), before)


@pytest.mark.parametrize("state", [torch.zeros(3, dtype=torch.uint8), {"layout": "tile64"}])
def test_a_state_that_says_it_in_another_way_is_refused(linear, state):
    before = bits(linear)
    with pytest.raises(RuntimeError, match="found a weight packed as"):
        linear.load_state_dict(another(linear).state_dict() | {"_extra_state": state})
    assert_same(linear.state_dict(), before)


def test_a_state_that_does_not_say_how_it_is_packed_is_missing_something(linear):
    state = linear.state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        linear.load_state_dict(state)
    other = another(linear)
    assert other.load_state_dict(state, strict=False).missing_keys == ["_extra_state"]
    assert torch.equal(other(X), linear(X))


# Casts, moves and copies

CASTS = {
    "half": (lambda m: m.half(), torch.float16), "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to float64": (lambda m: m.to(torch.float64), torch.float64), "double": (lambda m: m.double(), torch.float64),
    "there and back": (lambda m: m.half().float(), torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("cast, dtype", CASTS.values(), ids=CASTS)
def test_a_cast_leaves_the_weight_and_takes_the_bias(linear, cast, dtype):
    before, bias = bits(linear), cast(nn.ParameterList([linear.bias.clone()]))[0]
    assert cast(nn.Sequential(linear))[0] is linear and linear.bias.dtype == dtype
    assert_same(linear.state_dict(), before | {"bias": bias.detach(), "weight": before["weight"].to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_model_is_right(weight, dtype, assert_near):
    bias = torch.randn(N)
    module, x = nn.Sequential(PackedLinear(weight, bias)).to(dtype), X.to(dtype)
    assert_near(module(x), nn.functional.linear(x.double(), weight.decode(), bias.to(dtype).double()).to(dtype))


def test_a_deep_copy_has_its_own_tensors(linear):
    copied, expected = copy.deepcopy(linear), linear(X)
    assert not set(addresses(copied)) & set(addresses(linear)) and torch.equal(copied(X), expected)
    copied.load_state_dict(another(linear).state_dict())
    assert torch.equal(linear(X), expected) and not torch.equal(copied(X), expected)


def test_a_whole_module_goes_through_a_file(linear, tmp_path):
    torch.save(linear, tmp_path / "module")
    loaded = torch.load(tmp_path / "module", weights_only=False)
    assert_same(loaded.state_dict(), linear.state_dict())
    assert torch.equal(loaded(X), linear(X)) and repr(loaded) == repr(linear)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_it_goes_to_the_meta_device_and_is_filled_again(linear, dtype):
    state, expected = bits(linear), linear(X)
    linear.to("meta", dtype)
    tensors = ("bias", *PACKED)
    assert {getattr(linear, name).device.type for name in tensors} == {"meta"}
    dtypes = [dtype or torch.float32, torch.float32, torch.int32, torch.uint8]
    assert [getattr(linear, name).dtype for name in tensors] == dtypes
    assert linear(torch.empty(5, K, device="meta")).shape == (5, N)
    linear.to_empty(device="cpu").load_state_dict(state)
    assert {getattr(linear, name).device.type for name in tensors} == {"cpu"}
    assert torch.equal(linear.float().multiplier, state["multiplier"])
    if dtype is None:
        assert torch.equal(linear(X), expected)


# Compiled

BACKENDS = {
    "marlin_w4a16": lambda last: {"inductor": {"post_grad_custom_post_pass": last}},
    "inductor": lambda last: {"post_grad_custom_post_pass": last},
}


@pytest.fixture
def no_lookup(monkeypatch) -> None:
    def refuse(*args):
        raise AssertionError("a LiveCall looks weights up at each call")

    monkeypatch.setattr(marlin_w4a16.backend, "LiveCall", refuse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_it_is_one_op_and_nothing_is_looked_up(backend, no_lookup, said, assert_near):
    graphs = []
    model = nn.Sequential(PackedLinear(quantize_nvfp4(torch.randn(N, K)), torch.randn(N)))
    run = torch.compile(model, backend=backend, fullgraph=True, options=BACKENDS[backend](graphs.append))
    assert_near(run(X), model(X))
    (graph,) = graphs
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [OP]
    log = [("INFO", "1 packed linears (1 NVFP4 group 16; 1 CPU blocks), 4.7 KiB")]
    assert said() == (log if backend == "marlin_w4a16" else [])


def test_packed_linears_are_counted_by_format(no_lookup, said, assert_near):
    model = nn.Sequential(
        PackedLinear(quantize_nvfp4(torch.randn(64, K))), PackedLinear(quantize_mxfp4(torch.ones(64, 64)))
    )
    assert_near(torch.compile(model, backend="marlin_w4a16", fullgraph=True)(X), model(X))
    assert said() == [("INFO", "2 packed linears (1 NVFP4 group 16, 1 MXFP4 group 32; 2 CPU blocks), 7.1 KiB")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_loaded_in_place_is_what_the_compiled_module_runs(linear, backend, no_lookup, said, assert_near):
    run = torch.compile(linear, backend=backend, fullgraph=True)
    run(X)
    linear.load_state_dict(another(linear).state_dict())
    assert_near(run(X), linear(X))
    assert_near(run(X), nn.functional.linear(X, linear.to_fp4().decode(torch.float32), linear.bias))
    assert len(said()) == (backend == "marlin_w4a16")


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_gradients_are_those_of_the_dense_linear(weight, backend, assert_near):
    bias = nn.Parameter(torch.randn(N))
    module = PackedLinear(weight, bias)
    run = torch.compile(module, backend=backend, fullgraph=True) if backend else module
    grads = []
    for forward in (run, lambda x: nn.functional.linear(x, weight.decode(torch.float32), bias)):
        x = X.clone().requires_grad_()
        forward(x).pow(2).sum().backward()
        grads.append((x.grad, bias.grad))
        bias.grad = None
    for found, expected in zip(*grads, strict=True):
        assert expected.abs().sum() > 0
        assert_near(found, expected)


def test_a_mixed_model_has_both_counted(fp4_linear, said, assert_near):
    model = nn.Sequential(PackedLinear(quantize_nvfp4(torch.randn(64, K))), fp4_linear(32, 64, quantize_mxfp4))
    assert_near(torch.compile(model, backend="marlin_w4a16", fullgraph=True)(X), model(X))
    ((level, message),) = said()
    assert level == "INFO" and message.startswith(
        "1 packed linears (1 NVFP4 group 16; 1 CPU blocks), 4.8 KiB; "
        "replaced 1 of 1 FP4 linears (1 MXFP4 group 32; 1 CPU blocks), packed copies of "
    )


def test_they_are_explained(fp4_linear):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList([PackedLinear(quantize_nvfp4(torch.randn(64, K)))])
            self.twice, self.written = PackedLinear(quantize_mxfp4(torch.randn(64, 64))), fp4_linear(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.written(self.twice(self.twice(self.up[0](x))))

    model = Model()
    report = explain(model, X)
    found = [(row.path, row.spelling, row.shape, row.format, row.uses) for row in report.owned]
    assert found == [
        ("up.0", "packed", (64, K), "NVFP4 group 16", 1),
        ("twice", "packed", (64, 64), "MXFP4 group 32", 2),
    ]
    assert report.owned[0].outcome == Owned("marlin_w4a16::linear", "CPU blocks", model.up[0].packed.nbytes)
    assert [row.path for row in report.rows] == ["up.0", "twice", "written.codes"]
    assert [row.path for row in report.replaced] == ["written.codes"] and not report.rejected
    assert report.summary().startswith("2 packed linears (1 NVFP4 group 16, 1 MXFP4 group 32; 2 CPU blocks), 7.1 KiB; ")
    nbytes = [size(row.outcome.nbytes) for row in report.owned]
    assert [" ".join(line.split()) for line in str(report).splitlines()[1:3]] == [
        f"up.0 1 64 x 96 NVFP4 group 16 packed - {nbytes[0]} owned: linear (CPU blocks)",
        f"twice 1 64 x 64 MXFP4 group 32 packed x 2 - {nbytes[1]} owned: linear (CPU blocks)",
    ]


def test_a_sequence_is_explained_by_position():
    model = nn.Sequential(
        PackedLinear(quantize_nvfp4(torch.randn(64, K))), nn.ReLU(), PackedLinear(quantize_nvfp4(X[:, :64]))
    )
    assert [row.path for row in explain(model, X).owned] == ["0", "2"]
