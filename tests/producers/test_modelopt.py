"""Linears of NVIDIA ModelOpt: compressed, fake-quantised, or with the rounded weight folded in."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import E2M1_VALUES, PackedLinear, prepare, restore
from marlin_w4a16.kernels.quantize import encode
from marlin_w4a16.producers import modelopt as producer
from marlin_w4a16.producers.found import FoundModule
from swaps import MLP

pytestmark = [
    pytest.mark.filterwarnings("ignore:Real quantization has been applied:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute"),
    pytest.mark.filterwarnings("ignore:RealQuantLinear:UserWarning"),
]

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
# the format each makes
CONFIGS = {
    "W4A16_NVFP4_CFG": "NVFP4 group 16", "NVFP4_DEFAULT_CFG": "NVFP4 group 16", "MXFP4_DEFAULT_CFG": "MXFP4 group 32",
}  # fmt: skip
NVFP4 = ["W4A16_NVFP4_CFG", "NVFP4_DEFAULT_CFG"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantised(model: nn.Module, config: str, activations: bool = False) -> nn.Module:
    """The model with the fake quantisers of a config of ModelOpt."""
    import modelopt.torch.quantization as mtq

    chosen = copy.deepcopy(getattr(mtq, config))
    if not activations:
        chosen["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    x = X.to(next(model.parameters()).dtype)
    return mtq.quantize(model, chosen, lambda m: m(x) if activations else None)


def compressed(model: nn.Module, config: str, activations: bool = False) -> nn.Module:
    import modelopt.torch.quantization as mtq

    mtq.compress(quantised(model, config, activations))
    return model


@pytest.fixture(params=CONFIGS)
def config(request) -> str:
    return request.param


@pytest.fixture
def model(config) -> nn.Module:
    return compressed(MLP().bfloat16(), config)


def state(model: nn.Module) -> list[tuple]:
    """Every tensor of the model in its order: where, class, dtype, shape, bytes."""
    found = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        raw = tensor.detach().as_subclass(Tensor).flatten().view(torch.uint8)
        kept = (type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad, getattr(tensor, "metadata", None))
        found.append((name, *kept, bytes(raw.tolist())))
    return found


def refusal(model: nn.Module, **choices) -> str | None:
    """Why the first linear was left, in which case it was left as it was."""
    before = state(model)[:1]
    row = prepare(model, **choices).rows[0]
    assert row.producer == "ModelOpt"
    if row.refusal is not None:
        assert not isinstance(model.up, PackedLinear) and state(model)[:1] == before
    return row.refusal


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_decode_is_what_modelopt_dequantises(config, dtype):
    module = compressed(MLP().to(dtype), config).up
    found = producer.read(module, False)
    assert isinstance(found, FoundModule) and found.activations is None and found.dtype == dtype
    expected, decoded = module.weight_quantizer(module.weight), found.weights[0].decode(dtype)
    assert expected.dtype == dtype
    if config == "MXFP4_DEFAULT_CFG":
        assert torch.equal(decoded, expected)
    else:  # ModelOpt rounds scale times global scale, too, and has no negative zero
        integer = torch.int32 if dtype == torch.float32 else torch.int16
        apart = ((decoded + 0.0).view(integer).long() - (expected + 0.0).view(integer).long()).abs()
        assert apart.max() <= 1 and (dtype == torch.float32 or (apart == 0).float().mean() > 0.99)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_runs_as_modelopt_runs_it(config, dtype, assert_near):
    model, x = compressed(MLP().to(dtype), config), X.to(dtype)
    expected = model(x)
    swaps = prepare(model)
    assert [(row.path, row.producer, row.format) for row in swaps.done] == [
        ("up", "ModelOpt", CONFIGS[config]),
        ("down", "ModelOpt", CONFIGS[config]),
    ]
    assert isinstance(model.up, PackedLinear) and isinstance(model.down, PackedLinear)
    assert_near(model(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_restored_bit_for_bit(model, training):
    model.train(training)
    x = X.bfloat16()
    before, modules, output = state(model), list(model.modules()), model(x)
    swaps = prepare(model)
    assert all(module.weight is None for module in modules if isinstance(module, nn.Linear))
    assert [row.before for row in swaps.done] == [row.after for row in restore(model).done]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert state(model) == before and torch.equal(model(x), output)


def test_bytes_before_are_those_of_codes_and_scales(model):
    expected = [linear.weight.nbytes + linear.weight_quantizer._scale.nbytes for linear in (model.up, model.down)]
    assert [row.before for row in prepare(model).done] == expected


def test_the_memory_of_codes_and_scales_is_freed(model):
    tensors = [t for linear in (model.up, model.down) for t in (linear.weight, linear.weight_quantizer._scale)]
    originals = [weakref.ref(t.untyped_storage()) for t in tensors]
    del tensors
    gc.collect()
    assert all(reference() for reference in originals)
    prepare(model)
    gc.collect()
    assert not any(reference() for reference in originals)


def zeros(weight: Tensor) -> None:
    weight[0, :32] = 0


def tiny(weight: Tensor) -> None:
    weight[0, :32] *= 2.0**-20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spoil", [zeros, tiny])
def test_unusual_blocks_are_restored_bit_for_bit(config, dtype, spoil):
    """float16 does not hold their scales."""
    model = MLP().to(dtype)
    spoil(model.up.weight.data)
    compressed(model, config)
    before, output = state(model), model(X.to(dtype))
    done = prepare(model).done
    assert len(restore(model).done) == len(done)
    assert state(model) == before and torch.equal(model(X.to(dtype)), output)


@pytest.mark.parametrize("config", ["MXFP4_DEFAULT_CFG"])
@pytest.mark.parametrize("spoil", [zeros, tiny])
def test_unusual_blocks_that_were_loaded_over_are_forgotten(config, spoil):
    model, other = MLP().half(), compressed(MLP().half(), config)
    spoil(model.up.weight.data)
    compressed(model, config)
    expected = state(other)
    prepare(model)
    prepare(other)
    model.load_state_dict(other.state_dict())
    assert len(restore(model).done) == 2
    assert state(model) == expected


@pytest.mark.parametrize("config", ["W4A16_NVFP4_CFG"])
def test_a_weight_that_was_loaded_meanwhile_comes_back(config, model):
    other = compressed(MLP().bfloat16(), config)
    expected, output = state(other), other(X.bfloat16())
    prepare(model)
    prepare(other)
    model.load_state_dict(other.state_dict())
    restore(model)
    parts = {name: rest for name, *rest in state(model)}
    assert [name for name, *_ in expected] == list(parts)
    assert all(parts[name] == rest for name, *rest in expected if not name.endswith("_amax"))
    assert torch.equal(model(X.bfloat16()), output)


@pytest.mark.parametrize("config", ["MXFP4_DEFAULT_CFG"])
def test_a_multiplier_that_mxfp4_cannot_hold_stays_packed(model):
    prepare(model)
    with torch.no_grad():
        model.up.multiplier.mul_(3)
    rows = restore(model).rows
    assert rows[0].refusal == "up: found a multiplier of 3.0, expected 1 for ModelOpt's MXFP4"
    assert isinstance(model.up, PackedLinear) and rows[1].refusal is None


def test_quantised_activations_are_refused():
    reason = refusal(compressed(MLP().bfloat16(), "NVFP4_DEFAULT_CFG", activations=True))
    assert reason.startswith("its input quantiser is on (TensorQuantizer(")
    assert reason.endswith("prepare(model, activation_quant='drop') leaves that out")


def test_quantised_activations_are_dropped_and_restored(assert_near):
    model = compressed(MLP().bfloat16(), "NVFP4_DEFAULT_CFG", activations=True)
    before, x = state(model), X.bfloat16()
    for linear in (model.up, model.down):
        linear.input_quantizer.disable()
    expected = model(x)
    for linear in (model.up, model.down):
        linear.input_quantizer.enable()
    assert len(prepare(model, activation_quant="drop").done) == 2
    assert_near(model(x), expected)
    restore(model)
    assert state(model) == before and model.up.input_quantizer.is_enabled


@pytest.mark.parametrize("config", NVFP4)
def test_a_compressed_weight_without_its_scales_is_refused(model):
    del model.up.weight_quantizer._scale
    assert refusal(model) == "its weight quantiser holds no scales"


@pytest.mark.parametrize("name", ["input_quantizer", "weight_quantizer"])
def test_an_awq_scale_is_refused(model, name):
    getattr(model.up, name).pre_quant_scale = torch.ones(64)
    assert refusal(model) == f"its {name} has a pre_quant_scale (AWQ), which PackedLinear does not apply"


def test_quantised_outputs_are_refused(model):
    model.up.output_quantizer.enable()
    assert refusal(model) == "its output quantiser is on"


def test_a_rotated_weight_is_refused(model, monkeypatch):
    monkeypatch.setattr(type(model.up.weight_quantizer), "rotate_is_enabled", True)
    assert refusal(model) == "its input_quantizer rotates"


def test_a_sequence_of_quantisers_is_refused(model):
    from modelopt.torch.quantization.nn import SequentialQuantizer

    model.up.weight_quantizer = SequentialQuantizer(model.up.weight_quantizer)
    assert refusal(model) == "its weight has a SequentialQuantizer, expected one TensorQuantizer"


def test_a_hook_is_a_reason_to_leave_it(model):
    model.up.register_forward_hook(lambda *args: None)
    assert refusal(model) == "it has hooks, which a PackedLinear would lose"


def test_a_linear_that_computes_something_else_is_refused():
    import modelopt.torch.quantization as mtq

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = MLP()
    model.up.__class__ = Doubled
    mtq.register(original_cls=Doubled, quantized_cls=type(quantised(MLP(), "W4A16_NVFP4_CFG").down))
    try:
        quantised(model, "W4A16_NVFP4_CFG")
        assert refusal(model) == "a Doubled computes something else than nn.Linear"
    finally:
        mtq.unregister(Doubled)


def test_another_format_is_refused_by_its_name():
    assert refusal(compressed(MLP(), "FP8_DEFAULT_CFG")) == "its weight is a FP8QTensor, which is not FP4"


@pytest.mark.parametrize("k", [16, 48, 80])
def test_groups_that_cross_the_ends_of_rows_are_refused(k):
    """ModelOpt takes any weight whose elements are a multiple of 32."""
    model = MLP()
    model.up, model.down = nn.Linear(k, 96), nn.Linear(96, k)
    compressed(model, "MXFP4_DEFAULT_CFG")
    assert refusal(model) == f"its groups of 32 cross the ends of its rows of {k} columns"
    assert isinstance(model.down, PackedLinear)


def test_other_modules_have_no_row():
    model = quantised(nn.Sequential(nn.Conv1d(16, 16, 1)), "NVFP4_DEFAULT_CFG")
    assert hasattr(model[0], "weight_quantizer") and prepare(model).rows == ()


def test_a_weight_on_the_meta_device_is_left(model):
    model.up.to_empty(device="meta")
    rows = prepare(model).rows
    assert rows[0].refusal == "its weight holds no values: it is on the meta device"
    assert rows[1].refusal is None


# Dense weights


@pytest.fixture
def fake(config) -> nn.Module:
    return quantised(MLP().bfloat16(), config)


def test_a_dense_weight_is_left_with_a_hint(fake):
    assert refusal(fake) == (
        "its weight is dense: mtq.compress(model) packs it, "
        "prepare(model, recover=True) reads codes back where there are any"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fake quantisers run on CUDA")
def test_a_fake_quantiser_that_does_not_run_is_refused(fake):
    assert refusal(fake, recover=True).startswith("its fake quantiser does not run here: ")


def test_a_dense_weight_of_another_format_is_refused():
    model = quantised(MLP(), "FP8_DEFAULT_CFG")
    assert refusal(model, recover=True) == "its weight is dense, and its quantiser is not one of dynamic FP4 blocks"


@pytest.fixture
def folded(config) -> nn.Module:
    """What mtq.fold_weight(keep_attrs=True) leaves, which needs CUDA: rounded weights, quantisers off."""
    dense = MLP().bfloat16()
    model, twin = quantised(copy.deepcopy(dense), config), compressed(dense, config)
    for name in ("up", "down"):
        module, source = getattr(model, name), getattr(twin, name)
        module.weight.data = source.weight_quantizer(source.weight)
        module.weight_quantizer.disable()
    return model


def test_a_folded_weight_is_recovered_and_restored_bit_for_bit(config, folded, assert_near):
    x = X.bfloat16()
    before, modules, output = state(folded), list(folded.modules()), folded(x)
    assert before[0][4], "its weight requires grad"
    swaps = prepare(folded, recover=True)
    assert [row.format for row in swaps.done] == [CONFIGS[config]] * 2
    assert [row.before for row in swaps.done] == [96 * 64 * 2] * 2
    assert_near(folded(x), output)
    assert len(restore(folded).done) == 2
    assert all(a is b for a, b in zip(folded.modules(), modules, strict=True))
    assert state(folded) == before and torch.equal(folded(x), output)


def test_a_folded_weight_needs_recover(folded):
    assert refusal(folded).startswith("its weight is dense: ")


@pytest.mark.parametrize("config", NVFP4)
@pytest.mark.parametrize("recover", [True, False])
def test_a_folded_weight_without_its_scale_is_refused(folded, recover):
    del folded.up.weight_quantizer._amax
    assert refusal(folded, recover=recover) == (
        "its weight quantiser is off and holds no scale (mtq.fold_weight keeps it with keep_attrs=True)"
    )


def test_a_folded_weight_with_an_element_off_the_grid_is_refused(folded):
    weight = folded.up.weight.data
    weight[5, 7] = weight[5].abs().max() * 0.6
    reason = "its dense weight is not, bit for bit, the decode of codes with the scales on the module"
    assert refusal(folded, recover=True) == reason


def by_comparison(magnitude: Tensor, x: Tensor) -> Tensor:
    """As the kernels of ModelOpt do it: a negative zero becomes a positive one."""
    return torch.where(x >= 0, magnitude, -magnitude)


def up(scale: Tensor) -> Tensor:
    """Rounds to the E4M3 value above."""
    near = (0.999 * scale).to(torch.float8_e4m3fn)
    return (near.view(torch.uint8) + (near.float() < 0.999 * scale)).view(torch.float8_e4m3fn)


def on_cpu(
    quantizer: nn.Module,
    signed: Callable[[Tensor, Tensor], Tensor] = torch.copysign,
    rounded: Callable[[Tensor], Tensor] = lambda scale: scale.to(torch.float8_e4m3fn),
) -> None:
    """Stands for the fake quantiser, which needs CUDA."""
    factor = quantizer._amax.float() / (6 * 448)

    def forward(weight: Tensor) -> Tensor:
        blocks = weight.float().unflatten(1, (-1, 16))
        step = rounded(blocks.abs().amax(-1, keepdim=True) / (6 * factor)).float() * factor
        magnitude = torch.tensor(E2M1_VALUES)[encode(blocks.abs() / step).int()] * step
        return signed(magnitude, blocks).flatten(1).to(weight.dtype)

    quantizer.forward = forward


@pytest.fixture
def simulated() -> nn.Module:
    model = quantised(MLP(), "W4A16_NVFP4_CFG")
    for linear in (model.up, model.down):
        linear.weight_quantizer._amax = linear.weight.detach().abs().amax()
    return model


@pytest.mark.parametrize(
    "how", [{}, {"signed": by_comparison}, {"rounded": up}], ids=["exact", "sign by comparison", "scales rounded up"]
)
def test_a_fake_quantised_weight_is_recovered_and_comes_back_rounded(simulated, how, assert_near):
    for linear in (simulated.up, simulated.down):
        on_cpu(linear.weight_quantizer, **how)
    expected, rounded = simulated(X), simulated.up.weight_quantizer(simulated.up.weight).detach()
    keys, gradients = list(simulated.state_dict()), [p.requires_grad for p in simulated.parameters()]
    assert [row.refusal for row in prepare(simulated, recover=True).rows] == [None, None]
    assert_near(simulated(X), expected)
    restore(simulated)
    assert torch.equal(simulated.up.weight, rounded) and torch.equal(simulated(X), expected)
    assert list(simulated.state_dict()) == keys and [p.requires_grad for p in simulated.parameters()] == gradients


def test_a_scale_that_the_rounded_weight_does_not_tell_is_that_of_the_weight(simulated):
    """A block whose scale is 1.5 units of E4M3, rounded to two: its largest code is 4."""
    weight, quantizer, held = simulated.up.weight.data, simulated.up.weight_quantizer, []
    unit = 2.0**-9 * quantizer._amax / (6 * 448)
    weight[0, :16] = torch.tensor([9.0, 3.0] + [0.0] * 14) * unit

    def rounded(scale: Tensor) -> Tensor:
        held.append(scale.to(torch.float8_e4m3fn))
        return held[0]

    on_cpu(quantizer, rounded=rounded)
    assert torch.equal((quantizer(weight)[0, :2] / unit).round(), torch.tensor([8.0, 3.0]))
    assert prepare(simulated, recover=True).rows[0].refusal is None
    assert simulated.up.to_fp4().scales[0, 0] == 2


def test_a_fake_quantiser_that_changes_its_own_output_is_refused(simulated):
    simulated.up.weight_quantizer.forward = lambda weight: weight / 2
    reason = "its fake quantiser gives other values when it is run on its own output"
    assert refusal(simulated, recover=True) == reason


def test_a_fake_quantised_weight_without_its_scale_is_refused(simulated):
    del simulated.up.weight_quantizer._amax
    assert "holds no amax" in refusal(simulated, recover=True)


# Copies


def test_a_deep_copy_works_and_says_why_it_is_not_restored(model):
    before = state(model)
    prepare(model)
    copied, x = copy.deepcopy(model), X.bfloat16()
    assert torch.equal(copied(x), model(x))
    for row in restore(copied).rows:
        assert row.producer == "ModelOpt" and row.refusal.startswith("the original module could not be copied: ")
    assert torch.equal(copied(x), model(x))
    restore(model)
    assert state(model) == before


def test_a_saved_model_works_and_is_not_restored(model, tmp_path):
    prepare(model)
    torch.save(model, tmp_path / "model")
    loaded, x = torch.load(tmp_path / "model", weights_only=False), X.bfloat16()
    assert torch.equal(loaded(x), model(x))
    assert {row.refusal for row in restore(loaded).rows} == {"the original module is not saved with a packed one"}
