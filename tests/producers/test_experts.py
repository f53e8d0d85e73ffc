"""Experts whose stacked weights a producer made FP4: torchao can, ModelOpt and MX of torchao are refused."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from marlin_w4a16 import PackedExperts, prepare, restore
from mixtures.models import COMMON, FAMILIES, Family

IDS = torch.arange(1, 19).view(2, 9)
QWEN, GPT_OSS, NEMOTRON = (
    next(family for family in FAMILIES if family.name == name) for name in ("Qwen3Moe", "GptOss", "NemotronH")
)
# a swizzled stack is a stack of swizzled matrices only where rows come in 128s
WIDE = Family("Qwen3Moe", "", "", QWEN.settings | {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64})
FIRST = "model.layers.0.mlp.experts"


def names_of(module: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def nvfp4(dense: Tensor, scale: str | None = "per expert", **choices) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    amax = dense.abs().amax((1, 2), keepdim=True) if scale == "per expert" else dense.abs().amax()
    factor = None if scale is None else per_tensor_amax_to_scale(amax)
    return NVFP4Tensor.to_nvfp4(dense, per_tensor_scale=factor, **choices)


def built(family: Family = QWEN, dtype: torch.dtype = torch.float32, make=nvfp4, **choices) -> nn.Module:
    """A model whose experts torchao holds, and runs."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.name}Config")(**COMMON | family.settings)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).eval().to(dtype)
    model.set_experts_implementation("eager")
    for module in model.modules():
        if not hasattr(module, "_apply_gate"):
            continue
        for name in names_of(module):
            dense = 5 * getattr(module, name).detach()
            made = make(dense.mT.contiguous(), **choices).mT if module.is_transposed else make(dense, **choices)
            setattr(module, name, nn.Parameter(made, requires_grad=False))
        if module.has_bias:
            nn.init.normal_(module.gate_up_proj_bias), nn.init.normal_(module.down_proj_bias)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def bits(model: nn.Module) -> list[tuple]:
    """Every parameter of the experts: where, class, requires_grad, shape, strides, context, bytes of what is inside."""
    found = []
    for path, parameter in model.named_parameters():
        if ".experts." not in path:
            continue
        inner, context = parameter.__tensor_flatten__() if hasattr(parameter, "__tensor_flatten__") else ((), None)
        parts = [getattr(parameter, name).detach() for name in inner] or [parameter.detach()]
        held = [(p.shape, p.stride(), p.dtype, p.contiguous().view(-1).view(torch.uint8).tolist()) for p in parts]
        found.append((path, type(parameter), parameter.requires_grad, parameter.shape, list(inner), context, held))
    assert found
    return found


def experts_rows(swaps) -> list:
    return [row for row in swaps.rows if row.experts]


CASES = [
    (QWEN, {}), (QWEN, {"scale": "per tensor"}), (QWEN, {"scale": None}), (WIDE, {"is_swizzled_scales": True}),
    (GPT_OSS, {}), (NEMOTRON, {}),
]  # fmt: skip


@pytest.mark.parametrize("family, choices", CASES, ids=str)
def test_they_run_packed_and_are_restored_bit_for_bit(family, choices):
    model = built(family, **choices)
    before, expected = bits(model), logits(model)
    rows = experts_rows(prepare(model))
    assert len(rows) == 2 and {(r.producer, r.format, r.refusal) for r in rows} == {("torchao", "NVFP4 group 16", None)}
    packed = model.get_submodule(rows[0].path)
    assert isinstance(packed, PackedExperts) and rows[0].after == packed.w13.nbytes + packed.w2.nbytes
    assert packed.origin.module is not None and packed.origin.module.down_proj is None
    found = logits(model)
    assert not torch.equal(found, expected) and (found - expected).norm() <= 1e-5 * expected.norm()
    assert [(r.path, r.before, r.after) for r in restore(model).rows] == [(r.path, r.after, r.before) for r in rows]
    assert bits(model) == before and torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", [QWEN, GPT_OSS], ids=str)
def test_what_they_decode_to_is_what_torchao_dequantises(family):
    model = built(family)
    dense = model.get_submodule(FIRST)
    expected = [getattr(dense, name).dequantize(torch.float32) for name in names_of(dense)]
    prepare(model)
    for found, weight in zip(model.get_submodule(FIRST).to_fp4(), expected, strict=True):
        weight = weight.mT if family is GPT_OSS else weight
        assert torch.allclose(found.decode(torch.float32), weight, rtol=1e-6, atol=0)  # torchao rounds its scales


def test_copies_are_restored_by_themselves_and_changes_of_the_biases_are_kept():
    model = built(GPT_OSS)
    before = bits(model)
    prepare(model)
    copied = copy.deepcopy(model)
    packed = copied.get_submodule(FIRST)
    with torch.no_grad():
        packed.bias13.add_(1)
    packed.bias13.requires_grad_(False)
    for one in (copied, model):
        assert len(restore(one).done) == 2
    assert bits(model) == before
    found, original = copied.get_submodule(FIRST), model.get_submodule(FIRST)
    assert torch.equal(found.gate_up_proj_bias, original.gate_up_proj_bias + 1)
    assert not found.gate_up_proj_bias.requires_grad and found.down_proj_bias is not original.down_proj_bias
    assert torch.equal(found.down_proj_bias, original.down_proj_bias)


def test_what_torchao_cannot_hold_any_more_stays_packed():
    model = built(scale=None)
    prepare(model)
    with torch.no_grad():
        model.get_submodule(FIRST).multiplier2.mul_(2)
    first, second = restore(model).rows
    assert first.refusal == f"{FIRST}.w2: found a multiplier of 2.0, expected 1: there is no scale"
    assert second.refusal is None and isinstance(model.get_submodule(FIRST), PackedExperts)


def test_quantised_inputs_are_refused_or_dropped():
    from torchao.prototype.mx_formats.nvfp4_tensor import QuantizeTensorToNVFP4Kwargs

    model = built(act_quant_kwargs=QuantizeTensorToNVFP4Kwargs())
    before = bits(model)
    first, _ = experts_rows(prepare(model))
    assert first.refusal.startswith("its inputs are quantised (") and "activation_quant='drop'" in first.refusal
    assert bits(model) == before
    assert not [r for r in experts_rows(prepare(model, activation_quant="drop")) if r.refusal]
    assert len(restore(model).done) == 2 and bits(model) == before


def a_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def mx(dense: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(dense, torch.float4_e2m1fn_x2, 16)


REFUSED = {
    "dense": (lambda: built(make=lambda dense: dense), None, "its weights are dense torch.float32, of no producer"),
    "MX": (lambda: built(make=mx), "torchao", "its gate_up_proj is a MXTensor, expected an NVFP4Tensor"),
    "across": (
        lambda: built(Family("GptOss", "", "", GPT_OSS.settings), make=lambda dense: nvfp4(dense.mT.contiguous()).mT),
        "torchao",
        "its gate_up_proj: its codes do not lie in rows of what a product sums over",
    ),
}


@pytest.mark.parametrize("make, producer, reason", REFUSED.values(), ids=REFUSED)
def test_others_are_left_with_the_reason(make, producer, reason):
    model = make()
    left = model.get_submodule(FIRST)
    rows = experts_rows(prepare(model))
    assert {(row.producer, row.refusal.startswith(reason)) for row in rows} == {(producer, True)}, rows[0]
    assert model.get_submodule(FIRST) is left


def test_what_the_op_does_not_compute_is_left():
    model = built()
    a_hook(model.get_submodule(FIRST))
    model.model.layers[1].mlp.experts.act_fn = nn.Sigmoid()
    before = bits(model)
    reasons = [row.refusal for row in experts_rows(prepare(model))]
    assert reasons[0] == "it has hooks, which a PackedExperts would lose" and "is no activation of the op" in reasons[1]
    assert bits(model) == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [QWEN, GPT_OSS], ids=str)
def test_those_of_modelopt_are_dense_even_compressed(family):
    import modelopt.torch.quantization as mtq

    model = built(family, make=lambda dense: dense)
    mtq.quantize(model, mtq.W4A16_NVFP4_CFG, None)
    mtq.compress(model)
    assert type(model.get_submodule(FIRST)._parameters["down_proj"]) is nn.Parameter
    reason = "its weights are dense under the quantisers of ModelOpt, which compresses linears only"
    for choices in ({}, {"recover": True}):
        rows = experts_rows(prepare(model, **choices))
        assert [(row.producer, row.refusal) for row in rows] == [("ModelOpt", reason)] * 2
