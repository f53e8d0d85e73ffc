"""Whole mixtures of experts, found and proved in graphs; what is none stays right."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor, nn, sigmoid
from torch.nn.functional import gelu, relu, silu
from torch.utils.checkpoint import checkpoint

from marlin_w4a16 import Activation, PackedExperts, explain, quantize_mxfp4
from marlin_w4a16.options import Options
from marlin_w4a16.passes.mixture import proof, trial
from marlin_w4a16.passes.outcome import Replaced
from marlin_w4a16.passes.rewrite import rewrite
from marlin_w4a16.report.data import Report
from mixtures.activations import deepseek_v4
from mixtures.experts import stacked
from mixtures.models import FAMILIES
from mixtures.written import FORMS, H, Mixture, Parts, batched, grouped, halves, inputs, interleaved, native
from narrow import wide
from programs.backend import reported

SILU = "silu(gate) * up"
GPT_OSS = "silu(gate <= 7, 1.702) * (up in +-7 + 1)"


def ops_of(module: nn.Module, args: tuple, **options: object) -> tuple[set[str], set[str]]:
    """The names of the ops that replace its weights, and what their mixtures say; it computes what it did."""
    replaced = [row for row in assert_right(module, args, **options).rows if isinstance(row.outcome, Replaced)]
    return (
        {row.outcome.op.removeprefix("marlin_w4a16::") for row in replaced},
        {row.experts.activation for row in replaced if row.experts is not None},
    )


def assert_right(module: nn.Module, args: tuple, **options: object) -> Report:
    expected, (found, report) = module(*args), reported(module, args, **options)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    limit = 1e-5 if found.dtype == torch.float32 else 2e-2
    assert (found - expected).norm() <= limit * expected.norm()
    return report


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "parts, activation",
    [
        (Parts(), SILU), (Parts(activation=interleaved, bias=True), GPT_OSS),
        (Parts(activation=lambda z: relu(z).square(), gated=False), "relu2(z)"), (Parts(on_input=True), SILU),
    ],
    ids=["silu", "gpt-oss", "relu2", "on input"],
)  # fmt: skip
def test_each_form_is_one_op(form, parts, activation):
    module, args = Mixture(replace(parts, form=form)), inputs()
    assert ops_of(module, args) == ({"moe"}, {activation})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [grouped, batched, native])
def test_in_16_bits(form, dtype):
    if form is native and dtype == torch.float16:
        pytest.skip("torch's grouped product wants bfloat16")
    module, args = Mixture(Parts(form, interleaved, bias=True), quantize_mxfp4, dtype), inputs(dtype=dtype)
    assert ops_of(module, args) == ({"moe"}, {GPT_OSS})


def up_first(sums: Tensor) -> Tensor:
    gate, up = sums[..., ::2].clamp(max=7.0), sums[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * sigmoid(1.702 * gate)


def of_a_cube(sums: Tensor) -> Tensor:
    values = deepseek_v4(sums)
    return values + 1e-12 * values**3


@pytest.mark.parametrize("activation", [up_first, of_a_cube])
def test_an_activation_that_leaves_the_range_of_float16_is_left(activation):
    parts, dtypes = Parts(batched, activation), (torch.float32, torch.bfloat16, torch.float16)
    made = [ops_of(Mixture(parts, dtype=dtype), inputs(dtype=dtype, scale=0.5))[0] for dtype in dtypes]
    assert made == [{"moe"}, {"moe"}, {"grouped_linear"}]


def test_what_is_computed_in_a_wider_type_stays_in_its_range():
    def activation(sums: Tensor) -> Tensor:
        values = deepseek_v4(sums).float()
        return (values + 1e-12 * values**3).half()

    module, args = Mixture(Parts(batched, activation), dtype=torch.float16), inputs(dtype=torch.float16, scale=0.5)
    assert ops_of(module, args)[0] == {"moe"}


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_any_number_of_tokens(tokens):
    module, args = Mixture(Parts()), inputs(tokens)
    assert ops_of(module, args) == ({"moe"}, {SILU})


def test_a_dynamic_number_of_tokens():
    module, args = Mixture(Parts()), inputs()
    for given in args:
        torch._dynamo.mark_dynamic(given, 0)
    assert ops_of(module, args) == ({"moe"}, {SILU})
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="marlin_w4a16", fullgraph=True)
    for tokens in (7, 3, 12):
        args = inputs(tokens)
        for given in args:
            torch._dynamo.mark_dynamic(given, 0)
        torch.testing.assert_close(compiled(*args), module(*args), rtol=1e-4, atol=1e-4)


def gate(change, up=lambda u: u):
    """gpt-oss's activation with something else of gates and ups."""

    def activation(sums: Tensor) -> Tensor:
        return change(sums[..., ::2]) * up(sums[..., 1::2])

    return activation


def swiglu(low=None, high=7.0, alpha=1.702):
    return lambda g: g.clamp(low, high) * sigmoid(alpha * g.clamp(low, high))


def clamped_up(low=-7.0, high=7.0, offset=1.0):
    return lambda u: u.clamp(low, high) + offset


ACTIVATIONS = {
    "gpt-oss": (gate(swiglu(), clamped_up()), GPT_OSS),
    "another gate limit": (gate(swiglu(high=6.0), clamped_up()), GPT_OSS.replace("gate <= 7", "gate <= 6")),
    "another up limit": (gate(swiglu(), clamped_up(-5.0, 5.0)), GPT_OSS.replace("+-7", "+-5")),
    "gates limited below": (gate(swiglu(low=-7.0), clamped_up()), None),
    "ups limited on one side": (gate(swiglu(), clamped_up(low=None)), None),
    "limits of ups that differ": (gate(swiglu(), clamped_up(-6.0)), None),
    "no limit of ups": (gate(swiglu(), lambda u: u + 1), GPT_OSS.replace("up in +-7", "up")),
    "another alpha": (gate(swiglu(alpha=1.5), clamped_up()), GPT_OSS.replace("1.702", "1.5")),
    "no alpha": (gate(swiglu(alpha=1.0), clamped_up()), GPT_OSS.replace(", 1.702", "")),
    "another offset": (gate(swiglu(), clamped_up(offset=0.5)), GPT_OSS.replace("+ 1", "+ 0.5")),
    "limited after the offset": (gate(swiglu(), lambda u: (u + 1).clamp(-7.0, 7.0)), None),
    "limits far out": (gate(lambda g: silu(g.clamp(max=90.0)), lambda u: u), SILU.replace("gate", "gate <= 90")),
    "a factor": (gate(swiglu(), lambda u: 1.01 * clamped_up()(u)), None), "tanh": (gate(torch.tanh), None),
    "gelu": (gate(gelu), "gelu(gate) * up"),
    "gelu by tanh": (gate(lambda g: gelu(g, approximate="tanh")), "gelu_tanh(gate) * up"), "halves": (halves, SILU),
    "halves, up first": (lambda s: s.chunk(2, -1)[0] * silu(s.chunk(2, -1)[1]), SILU),
    "up first": (lambda s: s[..., ::2] * silu(s[..., 1::2]), SILU),
    "halves of quarters": (lambda s: halves(s.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :].flatten(-2)), None),
    "rows that are mixed": (lambda s: halves(s).flip(-1), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_is_the_one_of_the_graph_or_the_mixture_is_refused(name):
    activation, expected = ACTIVATIONS[name]
    module, args = Mixture(Parts(activation=activation, bias=True)), inputs(scale=8.0)
    found = ({"moe"}, {expected}) if expected else ({"grouped_linear"}, set())
    assert ops_of(module, args) == found


MUTATED = {
    "a factor on the sum": (Parts(total=lambda y: 2.5 * y.sum(1)), True),
    "a factor on the routing weights": (Parts(route=lambda w: 2.5 * w), False),
    "the routing weights are normalised inside": (Parts(route=lambda w: w / (1 + w)), False),
    "the routing weight is squared": (Parts(route=torch.square), False),
    "the mean of the experts": (Parts(total=lambda y: y.mean(1)), False),
    "the largest of the experts": (Parts(total=lambda y: y.amax(1)), False),
    "the first expert is left out": (Parts(total=lambda y: y[:, 1:].sum(1)), False),
    "something is done to the second product": (Parts(after=torch.tanh), False),
    "something is added to the second product": (Parts(after=lambda y: y + 0.1), False),
}


@pytest.mark.parametrize("form", [grouped, batched])
@pytest.mark.parametrize("name", MUTATED)
def test_what_is_around_the_products_is_kept_or_the_mixture_is_refused(name, form):
    parts, whole = MUTATED[name]
    module, args = Mixture(replace(parts, form=form)), inputs()
    assert ops_of(module, args) == (({"moe"}, {SILU}) if whole else ({"grouped_linear"}, set()))


class Twisted(Mixture):
    """One thing is wrong about its experts, sorted or not."""

    def __init__(self, twist: str, parts: Parts) -> None:
        super().__init__(parts)
        self.twist = twist
        self.more = nn.Buffer(torch.randn(H))

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        if self.twist == "weights of the next token":
            return super().forward(x, weights.roll(1, 0), ids)
        if self.twist == "experts of the next token":
            return super().forward(x, weights, ids.roll(1, 0))
        return super().forward(x, weights, (ids + 1) % 5)

    def expert(self, x, weight, chosen, multiply):
        y = super().expert(x, weight, chosen, multiply)
        return y + self.more if self.twist == "a constant that is no bias" else y


@pytest.mark.parametrize("form", [grouped, batched])
@pytest.mark.parametrize(
    "twist", ["weights of the next token", "experts of the next token", "the next expert", "a constant that is no bias"]
)
def test_routes_that_are_changed_are_followed_or_refused(twist, form):
    module, args = Twisted(twist, Parts(form)), inputs()
    assert_right(module, args)


def test_a_bias_of_one_product_only():
    class OfTheSecond(Mixture):
        def expert(self, x, weight, chosen, multiply):
            return (multiply(halves(multiply(x, self.gate_up_proj)), self.down_proj) + self.bias2[chosen]) * weight

    module, args = OfTheSecond(Parts(bias=True)), inputs()
    assert ops_of(module, args) == ({"moe"}, {SILU})


def test_a_bias_of_another_expert_is_refused():
    class Shifted(Mixture):
        def expert(self, x, weight, chosen, multiply):
            sums = multiply(x, self.gate_up_proj) + self.bias13[(chosen + 1) % 5]
            return multiply(halves(sums), self.down_proj) * weight

    module, args = Shifted(Parts(bias=True)), inputs()
    assert ops_of(module, args) == ({"grouped_linear"}, set())


def test_a_bias_that_is_zero_when_it_is_compiled_is_used_later():
    module, args = Mixture(Parts(activation=interleaved, bias=True)), inputs()
    module.bias13.zero_(), module.bias2.zero_()
    with patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward):
        compiled = torch.compile(module, backend="marlin_w4a16", fullgraph=True)
        compiled(*args)
        module.bias13.normal_(), module.bias2.normal_()
        torch.testing.assert_close(compiled(*args), module(*args), rtol=1e-4, atol=1e-4)


def test_what_is_read_on_the_way_stays():
    class Telling(Mixture):
        def total(self, y: Tensor) -> Tensor:
            self.largest = y.amax(1)
            return super().total(y)

        def forward(self, x, weights, ids):
            return super().forward(x, weights, ids) + self.largest

    module, args = Telling(Parts()), inputs()
    assert ops_of(module, args) == ({"grouped_linear"}, set())
    (row, _) = explain(module, *args).rows
    assert "is used elsewhere" in row.outcome.note


def test_what_is_computed_before_the_products_may_be_read_elsewhere():
    class Counting(Mixture):
        def forward(self, x, weights, ids):
            return super().forward(x, weights, ids) + torch.sort(ids.reshape(-1))[0].float().mean()

    module, args = Counting(Parts()), inputs()
    assert ops_of(module, args) == ({"moe"}, {SILU})


def test_tokens_that_are_written_to_in_place_are_refused():
    class Writing(Mixture):
        def expert(self, x, weight, chosen, multiply):
            weight.mul_(2)
            return super().expert(x, weight, chosen, multiply)

    module, args = Writing(Parts(batched)), inputs()
    torch._dynamo.reset()
    copies = [given.clone() for given in args]
    expected = module(*copies)
    found, _ = reported(module, tuple(given.clone() for given in args))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_options_choose_mixtures_and_pieces():
    module, args = Mixture(Parts()), inputs()
    assert ops_of(module, args) == ({"moe"}, {SILU})
    assert ops_of(module, args, grouped=False) == ({"moe"}, {SILU})
    assert ops_of(module, args, moe=False) == ({"grouped_linear"}, set())
    assert ops_of(module, args, moe=False, grouped=False) == (set(), set())
    rows = explain(module, *args, options={"moe": False, "grouped": False}).excluded
    assert [row.outcome.reason for row in rows] == ["options={'grouped': False}"] * 2
    assert_right(module, args, linear=False)


def test_without_pieces_a_mixture_that_is_refused_is_left_with_its_reason():
    module, args = Mixture(Parts(total=lambda y: y.amax(1))), inputs()
    (first, second) = explain(module, *args, options={"grouped": False}).rejected
    assert first.outcome.reason.startswith("no whole mixture: amax of what its experts give")
    assert first.outcome == second.outcome


def test_an_excluded_weight_leaves_the_other_as_a_piece():
    module, args = Mixture(Parts()), inputs()
    assert ops_of(module, args, exclude="gate_up_proj_codes") == ({"grouped_linear"}, set())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("moe", [True, wide(False)])
def test_verify_finds_no_error(form, moe):
    module = Mixture(Parts(form, interleaved, bias=True), quantize_mxfp4, torch.bfloat16)
    args, calls = inputs(dtype=torch.bfloat16), []
    torch._dynamo.reset()
    torch.compile(module, backend=lambda gm, given: calls.append((gm, given)) or gm.forward)(*args)
    rows = rewrite(*calls[0], Options(verify=True, moe=moe).settings).rows
    assert [0 <= row.outcome.error < 2e-2 for row in rows] == [True, True]


def test_two_mixtures_of_one_structure_are_proved_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Mixture(Parts()) for _ in range(3))

        def forward(self, x, weights, ids):
            for layer in self.layers:
                x = x + layer(x, weights, ids)
            return x

    module, args = Two(), inputs()
    prove = proof.Prover._prove
    with patch.object(proof.Prover, "_prove", autospec=True, side_effect=prove) as proved:
        assert_right(module, args)
    assert proved.call_count == 1


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_expert_for_each_token(form):
    module = Mixture(Parts(form, interleaved, bias=True))
    x, weights, ids = inputs()
    args = x, weights[:, :1].contiguous(), ids[:, :1].contiguous()
    assert ops_of(module, args) == ({"moe"}, {GPT_OSS})


def test_a_mixture_inside_a_checkpoint():
    class Recomputed(Mixture):
        def forward(self, x, weights, ids):
            return checkpoint(super().forward, x, weights, ids, use_reentrant=False)

    module, args = Recomputed(Parts()), inputs()
    assert ops_of(module, args) == ({"moe"}, {SILU})


def test_gradients_reach_tokens_and_routing_weights():
    module, (x, weights, ids) = Mixture(Parts()), inputs()
    found = []
    for function in (module, torch.compile(module, backend="marlin_w4a16", fullgraph=True)):
        a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
        function(a, b, ids).square().sum().backward()
        found.append((a.grad, b.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_nothing_of_the_dense_experts_is_left():
    module, args = Mixture(Parts(activation=interleaved, bias=True)), inputs()
    calls = []
    torch._dynamo.reset()
    torch.compile(module, backend=lambda gm, given: calls.append((gm, given)) or gm.forward)(*args)
    graph = rewrite(*calls[0]).graph.graph
    names = {str(node.target) for node in graph.nodes if node.op != "placeholder"}
    assert not any(name in text for text in names for name in ("sort", "histc", "grouped_mm", "float8", "silu", "mul"))
    assert sum("codes" in node.name and "words" not in node.name for node in graph.nodes) <= 6  # named after the codes


@pytest.mark.parametrize("tokens, experts", [(1, 5), (7, 5), (1, 40)])
def test_every_expert_and_every_size_of_token_is_tried(tokens, experts):
    module, args = Mixture(Parts(activation=interleaved, bias=True), experts=experts), inputs(tokens, experts=experts)
    seen: list[dict] = []
    before = trial.Trial._traced

    def traced(self, given, times):
        seen.append({name: given[getattr(self.mixture, name)] for name in ("x", "ids", "weights")})
        return before(self, given, times)

    with patch.object(trial.Trial, "_traced", traced):
        assert_right(module, args)
    x, ids, weights = (torch.cat([draw[name] for draw in seen]) for name in ("x", "ids", "weights"))
    assert set(range(experts)) <= set(ids.flatten().tolist())
    first = ids.flatten()[:experts]
    assert not torch.equal(first.sort().values, first), "sorting would change nothing"
    sizes = x.norm(dim=1) / H**0.5
    assert float(sizes.min()) < 3e-1 and float(sizes.max()) > 1e3
    assert weights.min() < 0 < weights.max()


def test_weights_of_zero_prove_nothing():
    module, args = Mixture(Parts()), inputs()
    module.gate_up_proj_codes.zero_()
    assert ops_of(module, args) == ({"grouped_linear"}, set()) and not module(*args).any()


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
def test_experts_that_are_elsewhere_add_nothing(how):
    """As transformers' expert parallelism says it: ids past the end, with routing weights of zero."""
    family = next(family for family in FAMILIES if family.name == "GptOss")
    experts = next(module for module in family.build(how).modules() if type(module).__name__ == family.experts)
    experts._is_expert_parallel = True
    x, weights, ids = torch.randn(7, 64), torch.rand(7, 2), torch.randint(4, (7, 2))
    ids[::2, 0], weights[::2, 0] = 4, 0.0
    assert ops_of(experts, (x, ids, weights)) == ({"moe"}, {GPT_OSS})


def test_in_inference_mode():
    module, args = Mixture(Parts()), inputs()
    with torch.inference_mode():
        assert_right(module, tuple(given.clone() for given in args))


def test_packed_experts_are_owned():
    w13, w2 = (stacked(torch.randn(shape)) for shape in ((4, 96, 64), (4, 64, 48)))
    module = nn.ModuleDict({"experts": PackedExperts(w13, w2, Activation(), "gate_up")})
    args = torch.randn(3, 64), torch.randint(4, (3, 2)), torch.rand(3, 2)
    report = explain(lambda *args: module["experts"](*args), *args)
    assert [row.outcome.op for row in report.owned] == ["marlin_w4a16::moe"] * 2 and len(report.rows) == 2
    assert [row.shape for row in report.rows] == [(4, 96, 64), (4, 64, 48)]
    assert [row.path.rpartition(".")[2] for row in report.rows] == ["w13", "w2"]
    assert str(report.rows[0].experts) == "2 of 4 experts, silu(gate) * up"
    assert report.summary().startswith(
        "2 packed stacks of experts (2 NVFP4 group 16; 2 CPU blocks; 2 in whole mixtures"
    )
