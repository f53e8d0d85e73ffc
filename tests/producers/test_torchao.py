"""Linears whose weight torchao made an NVFP4Tensor."""

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import PackedLinear, prepare, quantize_nvfp4, restore
from marlin_w4a16.producers import torchao as producer
from marlin_w4a16.producers.found import FoundModule
from marlin_w4a16.producers.torchao import swizzle, unswizzle

N, K = 144, 96  # neither fills its tiles of scales
X = torch.linspace(-1, 1, 3 * K).view(3, K)


def nvfp4(dense: Tensor, **choices) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(dense.abs().amax())
    return NVFP4Tensor.to_nvfp4(dense, **{"per_tensor_scale": scale, "is_swizzled_scales": True} | choices)


def linear(n: int = N, k: int = K, dtype: torch.dtype = torch.float32, **choices) -> nn.Linear:
    module = nn.Linear(k, n).to(dtype)
    module.weight = nn.Parameter(nvfp4(module.weight.detach(), **choices), requires_grad=False)
    return module


@pytest.fixture(params=[True, False], ids=["tensor scale", "no tensor scale"])
def quantised(request) -> nn.Module:
    """A bfloat16 model as torchao's own function quantises it."""
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    model = nn.Sequential(nn.Linear(K, N)).bfloat16()
    quantize_(model, NVFP4WeightOnlyConfig(use_dynamic_per_tensor_scale=request.param))
    return model


def inner(weight: Tensor) -> dict[str, Tensor]:
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}


def assert_same_weight(found: Tensor, expected: Tensor) -> None:
    assert type(found) is type(expected) and found.requires_grad == expected.requires_grad
    assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert found.__tensor_flatten__()[1] == expected.__tensor_flatten__()[1]
    assert list(inner(found)) == list(inner(expected))
    for name, value in inner(expected).items():
        other = inner(found)[name]
        assert (other.dtype, other.shape, other.stride()) == (value.dtype, value.shape, value.stride()), name
        assert torch.equal(other.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name


def copied(weight: Tensor) -> Tensor:
    return nn.Parameter(weight.detach().clone(), requires_grad=False)


def refusal(module: nn.Module, **choices) -> str | None:
    """Why it was left, in which case it was left as it was."""
    model, weight = nn.Sequential(module), copied(module.weight)
    (row,) = prepare(model, **choices).rows
    if row.refusal is not None:
        assert model[0] is module and row.producer == "torchao"
        assert_same_weight(module.weight, weight)
    return row.refusal


def test_the_exact_decode_is_what_torchao_dequantises_but_for_its_second_rounding(quantised):
    found = producer.read(quantised[0], False)
    assert isinstance(found, FoundModule) and found.activations is None and found.dtype == torch.bfloat16
    decoded, expected = found.weights[0].decode(torch.bfloat16), quantised[0].weight.dequantize()
    apart = (decoded.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert apart.max() <= 1 and (apart == 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("swizzled", [True, False])
def test_it_runs_as_torchao_runs_it(dtype, swizzled, assert_near):
    model = nn.Sequential(linear(dtype=dtype, is_swizzled_scales=swizzled))
    expected = model(X.to(dtype))
    assert [row.format for row in prepare(model).done] == ["NVFP4 group 16"]
    assert_near(model(X.to(dtype)), expected)


def test_it_is_restored_bit_for_bit(quantised):
    weight, module = copied(quantised[0].weight), quantised[0]
    assert prepare(quantised).done
    assert module.weight is None
    assert restore(quantised).done
    assert quantised[0] is module
    assert_same_weight(module.weight, weight)


@pytest.mark.parametrize("n, k", [(16, 64), (128, 64), (144, 96), (300, 208)])
@pytest.mark.parametrize("swizzled", [True, False])
def test_any_shape_is_restored_bit_for_bit(n, k, swizzled):
    model = nn.Sequential(linear(n, k, is_swizzled_scales=swizzled))
    weight = copied(model[0].weight)
    assert prepare(model).done[0].before == weight.qdata.numel() + weight.scale.numel()
    assert restore(model).done
    assert_same_weight(model[0].weight, weight)


def test_a_weight_without_a_tensor_scale_takes_no_other():
    model = nn.Sequential(linear(per_tensor_scale=None))
    prepare(model)
    model[0].load_state_dict(PackedLinear(quantize_nvfp4(torch.randn(N, K)), torch.zeros(N)).state_dict())
    (row,) = restore(model).rows
    assert row.refusal.startswith("0: found a multiplier of ") and row.refusal.endswith("there is no tensor scale")


@pytest.mark.parametrize("rows, columns", [(200, 6), (16, 4), (128, 8), (300, 13), (1, 1), (129, 5)])
def test_scales_are_swizzled_as_torchao_does_it(rows, columns):
    from torchao.prototype.mx_formats.utils import from_blocked, to_blocked

    scales = torch.randint(1, 0x7F, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
    blocked = to_blocked(scales.view(torch.uint8))
    shape = torch.Size((-(-rows // 128) * 32, -(-columns // 4) * 16))
    swizzled = swizzle(scales, shape)
    assert swizzled.shape == shape and swizzled.dtype == scales.dtype
    assert torch.equal(swizzled.view(torch.uint8).flatten(), blocked)
    back = unswizzle(swizzled, rows, columns)
    assert back.shape == scales.shape and back.dtype == scales.dtype and back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), from_blocked(blocked, rows, columns))
    assert torch.equal(back.view(torch.uint8), scales.view(torch.uint8))


@pytest.fixture
def activations() -> object:
    from torchao.prototype.mx_formats.nvfp4_tensor import QuantizeTensorToNVFP4Kwargs

    return QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True, is_swizzled_scales=True)


def test_quantised_activations_are_refused(activations):
    reason = refusal(linear(act_quant_kwargs=activations))
    assert reason.startswith("its inputs are quantised (QuantizeTensorToNVFP4Kwargs(")
    assert reason.endswith("prepare(model, activation_quant='drop') leaves that out")


def test_quantised_activations_are_dropped_and_restored(activations, assert_near):
    scale = torch.tensor(0.25)
    model = nn.Sequential(linear(act_quant_kwargs=activations, act_per_tensor_scale=scale))
    weight = copied(model[0].weight)
    assert len(prepare(model, activation_quant="drop").done) == 1
    assert_near(model(X), nn.functional.linear(X, weight.dequantize(), model[0].bias))
    restore(model)
    assert_same_weight(model[0].weight, weight)
    assert torch.equal(model[0].weight.act_per_tensor_scale, scale)


def test_a_linear_that_computes_something_else_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    module = linear()
    module.__class__ = Doubled
    assert refusal(module) == "a Doubled computes something else than nn.Linear"


def test_a_subclass_that_computes_the_same_is_taken():
    class Named(nn.Linear):
        pass

    module = linear()
    module.__class__ = Named
    assert refusal(module) is None


def test_a_transposed_weight_is_refused():
    module = linear(64, 64)
    module.weight = nn.Parameter(module.weight.detach().t(), requires_grad=False)
    assert refusal(module) == "its codes have shape (32, 64), expected rows [64, 32]"


def test_strided_codes_are_refused():
    module = linear()
    module.weight.qdata = module.weight.qdata.repeat_interleave(2, 1)[:, ::2]
    assert len(prepare(nn.Sequential(module)).refused) == 1


def test_scales_that_are_padded_with_something_are_refused():
    module = linear(16, 64)
    module.weight.scale.view(torch.uint8).view(-1)[4] = 1  # row 32 of a tile of 128
    assert refusal(module) == "its swizzled scales are not padded with zeros"


def test_a_scale_that_is_not_finite_is_refused():
    module = linear()
    module.weight.scale.view(torch.uint8).view(-1)[0] = 0x7F
    assert "found NaN (byte 0x7f)" in refusal(module)


@pytest.mark.parametrize(
    "config, name", [("Int8WeightOnlyConfig", "Int8Tensor"), ("Float8WeightOnlyConfig", "Float8Tensor")]
)
def test_another_format_is_refused_by_its_name(config, name):
    import torchao.quantization

    model = nn.Sequential(nn.Linear(K, N)).bfloat16()
    torchao.quantization.quantize_(model, getattr(torchao.quantization, config)())
    (row,) = prepare(model).rows
    assert row.producer == "torchao" and row.refusal == f"its weight is a {name}, expected an NVFP4Tensor"
