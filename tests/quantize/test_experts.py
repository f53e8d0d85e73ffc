"""The experts of a dense mixture made into packed ones: tiny models of real classes of transformers."""

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import transformers
from live import assert_one_module_at_a_time
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import use_experts_implementation

from marlin_w4a16 import FP4Weight, PackedExperts, prepare, quantize, quantize_mxfp4, quantize_nvfp4, restore
from mixtures.models import COMMON, FAMILIES, Family
from narrow import wide
from swaps import done, refusals
from weights import equal

QUANTISERS = {"nvfp4": (quantize_nvfp4, 16), "mxfp4": (quantize_mxfp4, 32)}
IDS = torch.arange(1, 19).view(2, 9)
BY_NAME = {family.name: family for family in FAMILIES}
SAME = [family for name, family in BY_NAME.items() if name != "Llama4"]  # its experts have no router's arguments
QWEN, GPT_OSS, NEMOTRON = BY_NAME["Qwen3Moe"], BY_NAME["GptOss"], BY_NAME["NemotronH"]
FIELDS = ("codes", "scales", "multiplier")
ALL_EXPERTS = "*.experts"


@pytest.fixture(params=QUANTISERS)
def format(request) -> str:
    return request.param


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if hasattr(module, "_apply_gate")}


def built(family: Family = QWEN, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.name}Config")(**COMMON | family.settings)
    model = getattr(transformers, f"{family.name}ForCausalLM")(config).eval()
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        for module in experts_of(model).values():
            for name, parameter in module.named_parameters():
                parameter.normal_(std=1.0 if name.endswith("bias") else 0.2)
    return model.to(dtype)


def rows_of(module: nn.Module) -> list[slice]:
    """Of gates and of ups, as the decorator says they lie."""
    if not module.has_gate:
        return [slice(None)]
    if not module.is_concatenated:
        return [slice(0, None, 2), slice(1, None, 2)]
    half = module.down_proj.shape[1 if module.is_transposed else 2]
    return [slice(0, half), slice(half, None)]


def weights_of(module: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor, list[slice]]]:
    """Each parameter, as ``[experts, n, k]``, and the rows of it that are rounded together."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    for parameter, parts in ((first, rows_of(module)), (module.down_proj, [slice(None)])):
        yield parameter, parameter.detach().mT if module.is_transposed else parameter.detach(), parts


def rounded(dense: Tensor, parts: list[slice], format: str) -> FP4Weight:
    quantiser, group = QUANTISERS[format]
    dense = nn.functional.pad(dense, (0, -dense.shape[2] % group))
    experts, n, k = dense.shape
    codes, scales = torch.zeros(experts, n, k // 2).byte(), torch.zeros(experts, n, k // group).byte()
    whole = FP4Weight(codes, scales, torch.zeros(experts, n), "e4m3" if group == 16 else "e8m0", group)
    for expert, matrix in enumerate(dense):
        for rows in parts:
            part = quantiser(matrix[rows].contiguous())
            for name in FIELDS:
                getattr(whole, name)[expert, rows] = getattr(part, name)
    return whole


@torch.no_grad()
def twin(model: nn.Module, format: str) -> tuple[nn.Module, dict[str, list[FP4Weight]]]:
    """A copy whose experts hold the exact decode of what they are to be rounded to, and that."""
    model, expected = copy.deepcopy(model), {}
    for path, module in experts_of(model).items():
        expected[path] = []
        for parameter, dense, parts in weights_of(module):
            weight = rounded(dense.float(), parts, format)
            exact = weight.decode(torch.float32)[..., : dense.shape[2]]
            parameter.copy_(exact.mT if module.is_transposed else exact)
            expected[path].append(weight)
    return model, expected


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "family, format", [*((family, "nvfp4") for family in SAME), (GPT_OSS, "mxfp4"), (NEMOTRON, "mxfp4")], ids=str
)
def test_a_model_computes_what_its_dequantised_twin_does(family, format):
    model = built(family)
    exact, weights = twin(model, format)
    assert done(quantize(model, format, include=ALL_EXPERTS)) == list(weights) and len(weights) == family.mixtures
    for path, expected in weights.items():
        module = model.get_submodule(path)
        assert isinstance(module, PackedExperts) and str(module.activation) == family.activation
        for found, weight in zip(module.to_fp4(), expected, strict=True):
            assert equal(found, weight)
    expected = logits(exact)
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()


def test_columns_that_are_no_whole_groups_are_filled_up(format):
    model = built(Family("Qwen3Moe", "", "", QWEN.settings | {"moe_intermediate_size": 40}))
    exact, weights = twin(model, format)
    assert len(quantize(model, format, include=ALL_EXPERTS).done) == 2
    (path, (_, w2)), *_ = weights.items()
    assert torch.equal(model.get_submodule(path).to_fp4()[1].codes, w2.codes)
    expected = logits(exact)
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    model = built(GPT_OSS, dtype)
    exact, weights = twin(model, "mxfp4")
    assert len(quantize(model, "mxfp4", include=ALL_EXPERTS).done) == 2
    path, (w13, _) = next(iter(weights.items()))
    assert torch.equal(model.get_submodule(path).to_fp4()[0].decode(), w13.decode())
    x, ids, weights = torch.randn(5, 64).to(dtype), torch.randint(4, (5, 2)), torch.rand(5, 2).to(dtype)
    with torch.no_grad():
        found, expected = (m.get_submodule(path)(x, ids, weights) for m in (model, exact))
    assert found.dtype == dtype and (found - expected).norm() <= 1e-2 * expected.norm()


def test_all_of_a_model_has_rows_and_they_say_what_is_what():
    model = built()
    swaps = quantize(model, "nvfp4", exclude="*v_proj")
    row, packed = next(row for row in swaps.rows if row.experts), model.model.layers[0].mlp.experts
    assert (row.path, row.format) == ("model.layers.0.mlp.experts", "NVFP4 group 16")
    assert row.before == 4 * 6 * (96 * 64 + 64 * 48) and row.after == packed.w13.nbytes + packed.w2.nbytes
    assert swaps.summary().startswith("swapped 7 of 9 linears and 2 of 2 Experts modules: ")


def test_biases_and_what_is_trained_are_kept():
    model = built(GPT_OSS).train()
    dense = model.model.layers[0].mlp.experts
    dense.down_proj_bias.requires_grad_(False)
    bias = dense.down_proj_bias
    quantize(model, "mxfp4")
    packed = model.model.layers[0].mlp.experts
    assert packed.bias2 is bias and not bias.requires_grad and packed.bias13.requires_grad and packed.training
    assert [name for name, p in packed.named_parameters() if p.requires_grad] == ["bias13"]


def test_what_is_packed_stays_and_is_not_restored():
    model = built()
    quantize(model, "nvfp4", include=ALL_EXPERTS)
    packed = model.model.layers[0].mlp.experts
    for again in (quantize(model, "nvfp4", include=ALL_EXPERTS), prepare(model)):
        assert {r.refusal for r in again.rows if r.experts} == {"it is packed already"}
    for one in (model, copy.deepcopy(model)):
        rows = restore(one).rows
        assert [(row.producer, row.refusal) for row in rows] == [
            ("quantize", "quantize() made it, and let its dense weight go")
        ] * 2
        assert isinstance(one.model.layers[0].mlp.experts, PackedExperts)
    assert model.model.layers[0].mlp.experts is packed


def test_experts_that_hold_packed_ones_are_told_once():
    model = built()
    quantize(model, "nvfp4", include=ALL_EXPERTS)
    dense = built()
    dense.model.layers[0].mlp.experts.packed = model.model.layers[0].mlp.experts
    paths = [row.path for row in quantize(dense, "nvfp4").rows if row.experts]
    assert paths == ["model.layers.0.mlp.experts.packed", "model.layers.1.mlp.experts"]


# Chosen by their paths

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    "include, exclude, expected",
    [
        (None, None, [FIRST, SECOND]), (FIRST, None, [FIRST]), ("*.1.mlp.*", None, [SECOND]),
        ("*proj", None, [FIRST, SECOND]), ("*down_proj", None, []), (None, "*down_proj", []),
        (None, "*.0.*", [SECOND]), (f"{FIRST}.gate_up_proj", None, []), (None, f"{FIRST}.gate_up_proj", [SECOND]),
    ],
)  # fmt: skip
def test_globs_choose(include, exclude, expected):
    assert [row.path for row in quantize(built(), "nvfp4", include, exclude).done if row.experts] == expected


def test_what_the_paths_leave_says_why():
    swaps = quantize(built(), "nvfp4", "*down_proj")
    assert refusals(swaps)[FIRST] == "gate_up_proj: it matches none of include='*down_proj'"
    assert refusals(quantize(built(), "nvfp4", exclude="*ts"))[FIRST] == "it matches exclude='*ts'"


# What is left as it is


class Doubled(transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts):
    def forward(self, *args) -> Tensor:
        return 2 * super().forward(*args)


def hidden(size: int):
    def change(module: nn.Module) -> None:
        module.gate_up_proj = nn.Parameter(torch.randn(6, 96, size))
        module.down_proj = nn.Parameter(torch.randn(6, size, 48))

    return change


def poison(module: nn.Module) -> None:
    with torch.no_grad():
        module.down_proj[3, 5, 7] = torch.nan


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


LEFT = {
    "its own forward": (lambda m: setattr(m, "__class__", Doubled), "a Doubled has a forward of its own"),
    "replaced": (lambda m: setattr(m, "forward", lambda *_: None), "its forward has been replaced"),
    "hooks": (hook, "it has hooks, which a PackedExperts would lose"),
    "computed": (lambda m: parametrize.register_parametrization(m, "down_proj", nn.Identity()),
     "its down_proj is computed, by a parametrisation or a hook"),
    "more": (lambda m: setattr(m, "adapter", nn.ReLU()), "it also holds adapter, which a PackedExperts would lose"),
    "a learnt gate": (lambda m: setattr(m, "act_fn", nn.PReLU()), "it also holds act_fn, which"),
    "another gate": (lambda m: setattr(m, "act_fn", nn.Sigmoid()), "what stands between the two products is no"),
    "a norm": (lambda m: setattr(m, "has_post_expert_norm", True), "it normalises what each expert gives"),
    "float64": (lambda m: m.double(), "its gate_up_proj is torch.float64, expected one of"),
    "dtypes": (lambda m: setattr(m, "down_proj", nn.Parameter(m.down_proj.half())),
     "its weights are torch.float32 on"),
    "meta": (lambda m: m.to("meta"), "its weight holds no values: it is on the meta device"),
    "groups": (hidden(72), "its weights are 6 x 96 x 72 and 6 x 72 x 48, expected a hidden size in groups of 16"),
    "shapes": (lambda m: setattr(m, "down_proj", nn.Parameter(torch.randn(6, 64, 40))),
     "its weights are 6 x 96 x 64 and 6 x 64 x 40, expected [experts, 2 i, hidden] and [experts, hidden, i]"),
    "small": (hidden(16),
     "its weights are 6 x 96 x 16 and 6 x 16 x 48, 54.0 KiB; packed, in whole tiles, they would"),
    "NaN": (poison, "its down_proj, expert 3: found NaN or Inf, expected finite values"),
}  # fmt: skip


@pytest.mark.parametrize("change, reason", LEFT.values(), ids=LEFT)
def test_experts_that_cannot_be_swapped_are_left_with_the_reason(change, reason):
    model = built()
    left = model.model.layers[0].mlp.experts
    change(left)
    weights = [*left.parameters()]
    if reason.endswith("they would"):
        left.half()  # so that packing gains nothing
        reason = reason.replace("54.0", "27.0")
    swaps = quantize(model, "nvfp4", include=ALL_EXPERTS)
    assert refusals(swaps)[FIRST].startswith(reason) and done(swaps) == [SECOND]
    assert model.model.layers[0].mlp.experts is left and all(
        a is b for a, b in zip(weights, left.parameters(), strict=True)
    )


def test_shared_weights_are_left_and_untied_by_name():
    model = built()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    left = refusals(quantize(model, "nvfp4", include=ALL_EXPERTS))
    for path, other in ((FIRST, SECOND), (SECOND, FIRST)):
        held = f"its down_proj is {other}.down_proj too: packed, it would be held beside that"
        assert left[path] == f"{held}; {path!r} in include unties it"
    row = next(row for row in quantize(model, "nvfp4", include=FIRST).rows if row.path == FIRST)
    assert row.note == f"untied from {SECOND}.down_proj" and row.before == 4 * 6 * 96 * 64


def test_experts_whose_weight_the_code_around_them_reads_are_left():
    class Reads(nn.Module):
        def __init__(self, experts: nn.Module):
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor, *args) -> Tensor:
            return self.experts(x.to(self.experts.down_proj.dtype), *args)

    model = Reads(built().model.layers[0].mlp.experts)
    reason = "Reads.forward reads its down_proj, which a PackedExperts does not have"
    assert refusals(quantize(model, "nvfp4")) == {"experts": reason}


# Memory


@use_experts_implementation
class Experts(nn.Module):
    """24 MB in float32."""

    def __init__(self, config):
        super().__init__()
        self.act_fn = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2048, 512))
        self.down_proj = nn.Parameter(torch.randn(4, 512, 1024))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("dtype, format", [wide(torch.bfloat16, "nvfp4"), (torch.float32, "mxfp4")], ids=str)
def test_no_more_is_held_than_the_weights_of_one_module_and_what_is_packed(dtype, format):
    quantize(built(), format)  # fills tables that stay
    config = transformers.Qwen3MoeConfig(**COMMON | QWEN.settings)
    assert_one_module_at_a_time(nn.Sequential(*(Experts(config).to(dtype) for _ in range(2))), format)


def test_dense_weights_go_one_at_a_time(monkeypatch):
    from marlin_w4a16.quantize import experts

    model = built()
    weights = [weakref.ref(module.down_proj.untyped_storage()) for module in experts_of(model).values()]
    pack, alive = experts.packed, []

    def watched(*args):
        alive.append(sum(reference() is not None for reference in weights))
        return pack(*args)

    gc.disable()  # nothing may wait for it
    try:
        monkeypatch.setattr(experts, "packed", watched)
        quantize(model, "nvfp4", include=ALL_EXPERTS)
        assert alive == [2, 1] and not any(reference() for reference in weights)
    finally:
        gc.enable()
