"""A dense model made into a packed one; what may not be quantised is left, with a reason."""

import copy
import gc
import sys
import weakref

import pytest
import torch
from live import assert_one_module_at_a_time
from torch import Tensor, nn

from marlin_w4a16 import PackedLinear, prepare, quantize, quantize_mxfp4, quantize_nvfp4, restore
from marlin_w4a16.prepare import Swap
from narrow import wide
from swaps import MLP, done, refusals
from weights import equal

QUANTISERS = {"nvfp4": quantize_nvfp4, "mxfp4": quantize_mxfp4}
VOCABULARY = 128
TOKENS = torch.arange(12).view(1, 12) * 7 % VOCABULARY


@pytest.fixture(params=QUANTISERS)
def format(request) -> str:
    return request.param


@pytest.fixture(params=["Llama", "Qwen3", "Gemma3"])
def model(request) -> nn.Module:
    """Two tiny layers. The head of Gemma is tied to its embedding."""
    return causal_lm(request.param)


def causal_lm(family: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config" if family != "Gemma3" else "Gemma3TextConfig")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return getattr(transformers, f"{family}ForCausalLM")(config(**sizes, **heads, pad_token_id=0)).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def dequantised(model: nn.Module, format: str) -> nn.Module:
    """A copy with the exact decode of what each linear but the head is to be quantised to."""
    twin = copy.deepcopy(model)
    for path, module in linears(twin).items():
        if path != "lm_head":
            weight = QUANTISERS[format](module.weight).decode(module.weight.dtype)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return twin


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def assert_weight(module: nn.Module, dense: Tensor, format: str) -> None:
    """The module holds what the quantiser gives, in every bit."""
    assert isinstance(module, PackedLinear) and equal(module.to_fp4(), QUANTISERS[format](dense))


# Whole models


def test_a_model_computes_what_its_dequantised_twin_does(model, format):
    twin, dense = dequantised(model, format), {path: m.weight.detach() for path, m in linears(model).items()}
    expected = logits(twin)
    swaps = quantize(model, format)
    assert refusals(swaps) == {"lm_head": "usually dense: it matches exclude='*lm_head*' by default"}
    assert done(swaps) == [path for path in dense if path != "lm_head"] and len(swaps.done) == 14
    for path in done(swaps):
        assert_weight(model.get_submodule(path), dense[path], format)
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()


def test_it_generates_what_its_dequantised_twin_does(model, format):
    twin = dequantised(model, format)
    quantize(model, format)
    found, expected = (m.generate(TOKENS, max_new_tokens=8, do_sample=False) for m in (model, twin))
    assert found.shape == (1, 20) and torch.equal(found, expected)


@pytest.mark.parametrize("inductor", [False, wide(True)])
def test_it_compiles(format, inductor, said, monkeypatch):
    if not inductor:
        monkeypatch.setattr("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward)
    model = causal_lm("Llama")
    quantize(model, format)
    found, expected = logits(torch.compile(model, backend="marlin_w4a16", fullgraph=True)), logits(model)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    ((_, message),) = said()
    assert message.startswith("14 packed linears")


def test_its_state_is_loaded_by_another_model_quantised_alike(model, format):
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    quantize(model, format), quantize(other, format)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_a_deep_copy_stands_by_itself(format):
    model = causal_lm("Llama")
    quantize(model, format)
    twin, expected = copy.deepcopy(model), logits(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.words.zero_()
    assert torch.equal(logits(twin), expected)


# Modules


def test_each_linear_has_a_row():
    assert quantize(MLP().bfloat16(), "nvfp4").rows == (
        Swap("up", None, "NVFP4 group 16", None, 96 * 64 * 2, 2 * (2048 + 256) + 96 * 4),
        Swap("down", None, "NVFP4 group 16", None, 96 * 64 * 2, 2 * (2048 + 256) + 64 * 4),
    )


def test_they_are_printed_as_a_table():
    assert str(quantize(MLP(), "mxfp4", exclude="up")).splitlines() == [
        "module  producer  format          bytes                outcome",
        "up      -         -               -                    it matches exclude='up'",
        "down    -         MXFP4 group 32  24.0 KiB -> 4.5 KiB  swapped",
        "swapped 1 of 2 linears: 24.0 KiB -> 4.5 KiB",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_what_else_a_linear_has_is_kept(training, format):
    model = MLP().train(training)
    model.up.bias.requires_grad_(training)
    bias = model.up.bias
    quantize(model, format)
    assert model.up.bias is bias and bias.requires_grad is training and model.down.bias is None
    assert {module.training for module in model.modules()} == {training}
    assert not any(p.requires_grad for p in model.parameters() if p is not bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_models(dtype, format, assert_near):
    model = MLP().to(dtype)
    twin, x = dequantised(model, format), torch.randn(5, 64, dtype=dtype)
    assert len(quantize(model, format).done) == 2
    assert_near(model(x), twin(x))


def test_only_float16_minds_a_row_of_many_powers_of_two():
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3, :32], model[0].weight[3, 32:] = 2.0**-24, 2.0**15
    reason = refusals(quantize(copy.deepcopy(model).half(), "mxfp4"))["0"]
    assert reason.startswith("its weight: scales: row 3 holds powers of two from -26 to 13")
    assert done(quantize(model.bfloat16(), "mxfp4")) == ["0"]


def test_a_second_time_changes_nothing(format):
    model = MLP()
    quantize(model, format)
    modules, packed = [*model.modules()], dict.fromkeys(("up", "down"), "it is packed already")
    assert refusals(quantize(model, format)) == refusals(prepare(model)) == packed
    assert modules == [*model.modules()]


def test_nothing_is_restored(format):
    model = MLP()
    quantize(model, format)
    up, gone = model.up, "quantize() made it, and let its dense weight go"
    for one in (model, copy.deepcopy(model)):
        assert [(row.path, row.producer, row.refusal) for row in restore(one).rows] == [
            ("up", "quantize", gone),
            ("down", "quantize", gone),
        ]
    assert model.up is up


def test_a_linear_of_several_places_is_swapped_once_in_all():
    shared, x = nn.Linear(64, 64), torch.randn(2, 64)
    dense = shared.weight.detach()
    model = nn.Sequential(nn.Sequential(shared), nn.ReLU(), shared, shared)
    assert done(quantize(model, "nvfp4")) == ["0.0"]
    assert_weight(model[0][0], dense, "nvfp4")
    assert model[0][0] is model[2] is model[3] and model(x).shape == (2, 64)


@pytest.mark.parametrize("format", ["nvpf4", "NVFP4", "int4"])
def test_an_unknown_format_raises(format):
    model, hint = MLP(), r" Did you mean 'nvfp4'\?" if format == "nvpf4" else ".*"
    with pytest.raises(ValueError, match=rf"unknown format '{format}'\.{hint} Known: mxfp4, nvfp4"):
        quantize(model, format)
    assert type(model.up) is nn.Linear


# Memory


@pytest.mark.parametrize(
    "dtype, format",
    [
        (torch.bfloat16, "nvfp4"), wide(torch.float32, "nvfp4"), wide(torch.bfloat16, "mxfp4"),
        wide(torch.float32, "mxfp4"),
    ],
    ids=str,
)  # fmt: skip
def test_no_more_is_held_than_one_dense_weight_and_its_packed_copy(dtype, format):
    """The gate is 64 MB above packed and largest; nothing else but codes in both orders and blocks is needed."""
    quantize(MLP(), format)  # fills tables that stay
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False, dtype=dtype) for _ in range(6)))
    assert_one_module_at_a_time(model, format)


@pytest.mark.parametrize("progress", [None, True])
def test_dense_weights_go_one_at_a_time(monkeypatch, format, progress):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    weights = [weakref.ref(linear.weight.untyped_storage()) for linear in model]
    quantiser, group = sys.modules["marlin_w4a16.quantize.quantize"]._QUANTISERS[format]
    alive = []

    def watched(weight: Tensor, name: str):
        alive.append(sum(reference() is not None for reference in weights))
        return quantiser(weight, name=name)

    gc.disable()  # nothing may wait for it
    try:
        monkeypatch.setitem(sys.modules["marlin_w4a16.quantize.quantize"]._QUANTISERS, format, (watched, group))
        quantize(model, format, progress=progress)
        assert alive == [4, 3, 2, 1] and not any(reference() for reference in weights)
    finally:
        gc.enable()


def test_a_head_that_was_untied_stays_so_when_weights_are_tied_again(format):
    model = causal_lm("Gemma3")
    quantize(model, format, include="lm_head", progress=False)
    expected = logits(model)
    for again in (model, copy.deepcopy(model)):
        again.tie_weights()
        assert again.lm_head.weight.shape == (0, 0) and not again.all_tied_weights_keys
        assert torch.equal(logits(again), expected)
    assert causal_lm("Gemma3").all_tied_weights_keys == type(model)._tied_weights_keys


def test_a_head_of_a_part_is_untied_there_alone(format):
    parts = nn.ModuleDict({"a": causal_lm("Gemma3"), "b": causal_lm("Gemma3")})
    quantize(parts, format, include="b.lm_head", progress=False)
    for part in parts.values():
        part.tie_weights()
    assert parts["a"].lm_head.weight is parts["a"].get_input_embeddings().weight
    assert parts["b"].lm_head.weight.shape == (0, 0)


@pytest.mark.gpu
def test_the_memory_of_a_gpu(format):
    model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False, dtype=torch.bfloat16, device="cuda") for _ in range(4)))
    quantize(nn.Sequential(nn.Linear(64, 64, device="cuda")), format)
    torch.cuda.reset_peak_memory_stats()
    start, dense = torch.cuda.memory_allocated(), 4 * 8192 * 8192 * 2
    packed = sum(row.after for row in quantize(model, format).done)
    assert torch.cuda.max_memory_allocated() - start <= packed // 4 + dense // 4 + (64 << 20)
    assert torch.cuda.memory_allocated() == start - dense + packed
