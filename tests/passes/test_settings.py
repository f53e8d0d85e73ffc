"""What a user may choose, through the whole pass: which weights, strictness, verification, tolerance, dense weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import NotReplaced, Report, explain, quantize_mxfp4
from marlin_w4a16.options import Options
from marlin_w4a16.passes.judge import weights
from marlin_w4a16.passes.live import binding
from marlin_w4a16.passes.outcome import Excluded, Rejected, Replaced, Row
from marlin_w4a16.passes.replace import whole
from marlin_w4a16.passes.rewrite import rewrite, survey
from marlin_w4a16.passes.settings import Settings
from programs.backend import through_backend

X = torch.linspace(-1, 1, 3 * 64).view(3, 64)
OP = torch.ops.marlin_w4a16.linear.default


@pytest.fixture
def model(fp4_linear) -> nn.Module:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = fp4_linear(64, 64), nn.Sequential(fp4_linear(64, 64), fp4_linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.attn(x))

    return Block()


@pytest.fixture
def warned(caplog):
    """What the backend has warned of so far."""
    return lambda: [r.message for r in caplog.records if r.name == "marlin_w4a16" and r.levelname == "WARNING"]


def excluded(settings: Settings, *paths: str) -> list[str | None]:
    found = [settings.excluded(path) for path in paths]
    assert all(value is None or isinstance(value, Excluded) for value in found)
    return [value and value.reason for value in found]


@pytest.mark.parametrize(
    "pattern, paths",
    [
        ("layers.*.mlp", ["layers.0.mlp.codes", "layers.11.mlp.codes"]),
        ("layers.*", ["layers.0.mlp.codes", "layers.11.mlp.codes", "layers.0.attn.codes"]),
        ("layers.0.mlp.codes", ["layers.0.mlp.codes"]),
        ("*.mlp.codes", ["layers.0.mlp.codes", "layers.11.mlp.codes"]), ("layers.[!0]*", ["layers.11.mlp.codes"]),
        ("layers.?.mlp", ["layers.0.mlp.codes"]), ("mlp", []), ("LAYERS.*", []), ("layers", []),
        ("lm_head", ["lm_head.codes"]),
    ],
)  # fmt: skip
def test_globs_are_of_the_path_of_a_weight_or_of_its_module(pattern, paths):
    known = ["layers.0.mlp.codes", "layers.11.mlp.codes", "layers.0.attn.codes", "lm_head.codes"]
    assert [path for path in known if Settings(exclude=(pattern,)).excluded(path)] == paths
    assert [path for path in known if not Settings(include=(pattern,)).excluded(path)] == paths


def test_what_excludes_a_weight_is_named():
    settings = Settings(include=("a.*", "b"), exclude=("*.skip", "b.codes"))
    assert excluded(settings, "a.up.codes", "a.skip.codes", "a.skip", "b.codes", "c.codes") == [
        None, "it matches exclude='*.skip'", "it matches exclude='*.skip'", "it matches exclude='b.codes'",
        "it matches none of include='a.*', 'b'",
    ]  # fmt: skip
    assert excluded(Settings(), "a.codes") == [None]
    assert excluded(Settings(include=()), "a.codes") == ["it matches none of include="]


CHOICES = {
    "exclude": ({"exclude": "mlp.*"}, {"attn.codes"}),
    "exclude some": ({"exclude": ["attn", "mlp.1"]}, {"mlp.0.codes"}),
    "include": ({"include": "mlp.*"}, {"mlp.0.codes", "mlp.1.codes"}),
    "include some": ({"include": ["attn", "mlp.1"]}, {"attn.codes", "mlp.1.codes"}),
    "include, less what is excluded": ({"include": ["mlp.*"], "exclude": ["mlp.0"]}, {"mlp.1.codes"}),
    "include nothing": ({"include": []}, set()),
    "none": ({}, {"attn.codes", "mlp.0.codes", "mlp.1.codes"}),
}


def outcomes(rows: tuple[Row, ...], outcome: type) -> set[str]:
    return {row.path for row in rows if type(row.outcome) is outcome}


@pytest.mark.parametrize("options, replaced", CHOICES.values(), ids=CHOICES)
def test_weights_are_included_and_excluded(model, trace, assert_near, options, replaced):
    everything, settings = {"attn.codes", "mlp.0.codes", "mlp.1.codes"}, Options(**options).settings
    gm, inputs = trace(model, X)
    rewritten = rewrite(gm, inputs, settings)
    assert outcomes(rewritten.rows, Replaced) == replaced
    assert outcomes(rewritten.rows, Excluded) == everything - replaced
    assert survey(gm, inputs, settings) == rewritten.rows == explain(model, X, options=options).rows
    targets = [node.target for node in rewritten.graph.graph.nodes]
    assert (targets.count(OP), targets.count(linear)) == (len(replaced), 3 - len(replaced))
    found, _ = through_backend(model, (X,), **options)
    assert_near(found, model(X))


def test_what_is_excluded_is_not_evaluated(model, trace, monkeypatch):
    monkeypatch.setattr(weights, "recognise", None)
    rows = rewrite(*trace(model, X), Settings(exclude=("*",))).rows
    assert outcomes(rows, Excluded) == {"attn.codes", "mlp.0.codes", "mlp.1.codes"}


def spoil(layer: nn.Module) -> None:
    layer.table[3] = 1.4


def test_strict_raises_with_every_refusal(model):
    spoil(model.attn)
    spoil(model.mlp[1])
    with pytest.raises(Exception, match="NotReplaced") as caught:
        torch.compile(model, backend="marlin_w4a16", options={"strict": True})(X)
    message = str(caught.value)
    assert "strict: 2 of 3 FP4 weights are not replaced" in message
    for path in ("attn.codes", "mlp.1.codes"):
        assert f"\n{path} (64 x 64, F.linear): left: it is not NVFP4 group 16, low nibble first: row " in message
    assert "mlp.0.codes" not in message


def test_the_error_of_strict_is_one_of_its_own():
    rows = (
        Row("a.codes", "F.linear", (8, 32), None, Rejected("it is NF4"), 9),
        Row("b.codes", "matmul", (8, 32), "MXFP4 group 32", Replaced("op", "Triton", 1), 9),
    )
    error = NotReplaced(Report(rows))
    assert isinstance(error, RuntimeError)
    assert str(error).splitlines() == [
        "strict: 1 of 2 FP4 weights are not replaced", "a.codes (8 x 32, F.linear): left: it is NF4",
    ]  # fmt: skip


def test_strict_is_content_where_all_is_replaced(model, assert_near):
    found, line = through_backend(model, (X,), strict=True)
    assert line.startswith("replaced 3 of 3 FP4 linears")
    assert_near(found, model(X))


@pytest.mark.parametrize("options", [{"exclude": ["attn"]}, {"include": ["mlp.*"]}], ids=str)
def test_strict_does_not_count_what_is_excluded(model, assert_near, options):
    spoil(model.attn)
    found, line = through_backend(model, (X,), strict=True, **options)
    assert line.startswith("replaced 2 of 2 FP4 linears")
    assert_near(found, model(X))


def test_strict_is_content_without_fp4():
    through_backend(nn.Linear(64, 64), (X,), strict=True)


def error_of(row: Row) -> float:
    assert isinstance(row.outcome, Replaced)
    return row.outcome.error


def test_verify_gives_the_error_of_each_weight(model, trace):
    gm, inputs = trace(model, X)
    assert [0 <= error_of(row) < 1e-6 for row in rewrite(gm, inputs, Settings(verify=True)).rows] == [True] * 3
    assert [error_of(row) for row in rewrite(gm, inputs).rows] == [None] * 3


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)], ids=str)
def test_verify_in_sixteen_bits(fp4_linear, trace, dtype, most):
    (row,) = rewrite(*trace(fp4_linear(dtype=dtype), X.to(dtype)), Settings(verify=True)).rows
    assert 0 < error_of(row) < most


def test_verify_under_autocast(fp4_linear, trace):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (row,) = rewrite(*trace(fp4_linear(), X), Settings(verify=True)).rows
    assert 0 < error_of(row) < 2.0**-7


PRODUCTS = {
    "bias": lambda x, w: linear(x, w, torch.ones(48)),
    "addmm": lambda x, w: torch.addmm(x[:, :1], x, w.T, beta=0.5, alpha=3),
    "addmm of its size": lambda x, w: torch.addmm(x[:, :1], x, w.T, alpha=x.shape[0]),
    "einsum": lambda x, w: torch.einsum("ghk,hnk->gnh", x.view(-1, 1, 64).expand(-1, 4, 64), w.view(4, 12, 64)),
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(1), x.expand(2, *x.shape), w.view(2, 24, 64).mT),
    "columns of two axes": lambda x, w: torch.einsum("bij,nji->nb", x.view(-1, 4, 16), w.view(48, 16, 4)),
    "two": lambda x, w: linear(x, w) + x @ w.T,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_verify_of_each_kind_of_product(fp4_linear, trace, product, dynamic):
    module, x = fp4_linear(), torch.randn(5, 64)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    rows = rewrite(*trace(lambda x: product(x, module.weight()), x), Settings(verify=True)).rows
    assert rows and all(error_of(row) < 1e-6 for row in rows)


def test_verify_shows_a_packed_weight_that_is_wrong(fp4_linear, trace, monkeypatch):
    adopt = binding.Binding.adopt

    def spoiled(self, leaves, weight):
        packed = adopt(self, leaves, weight)
        packed.words[0, 0, :16] ^= 0x7FFF
        return packed

    monkeypatch.setattr(binding.Binding, "adopt", spoiled)
    (row,) = rewrite(*trace(fp4_linear(), X), Settings(verify=True)).rows
    assert error_of(row) > 0.05


def test_verify_gives_the_worst_error_of_its_products(fp4_linear, trace, monkeypatch):
    module, errors = fp4_linear(), iter([0.25, 0.5, 0.125])
    monkeypatch.setattr(whole, "worst_error", lambda *args: next(errors))

    def function(x: Tensor) -> Tensor:
        weight = module.weight()
        return linear(x, weight) + linear(x * 2, weight) + linear(x * 3, weight)

    (row,) = rewrite(*trace(function, X), Settings(verify=True)).rows
    assert error_of(row) == 0.5


def test_verify_leaves_the_random_state_alone(model):
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    through_backend(model, (X,), verify=True)
    assert torch.equal(torch.randn(4), expected)


class Twice(nn.Module):
    """A weight that the model rounds twice to 16 bits."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        codes = torch.stack((layer.codes & 15, layer.codes >> 4), -1).flatten(-2).int()
        blocks = layer.table[codes].unflatten(-1, (layer.scales.shape[-1], -1)).to(x.dtype)
        scales = (layer.scales.view(layer.kind).float() * layer.factor).to(x.dtype)
        return linear(x, (blocks * scales.unsqueeze(-1)).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_tolerance_is_of_the_largest_relative_error(fp4_linear, trace, dtype):
    module = Twice(fp4_linear())
    module.layer.factor.fill_(0.0013)
    gm, inputs = trace(module, X.to(dtype))
    (row,) = rewrite(gm, inputs).rows
    assert isinstance(row.outcome, Rejected)
    assert f"rounded twice in the model ({str(dtype)[6:]}: scale, weight)" in row.outcome.reason
    replaced = [
        type(rewrite(gm, inputs, Options(tolerance=tolerance).settings).rows[0].outcome) is Replaced
        for tolerance in (0, 1e-6, 2**-7)
    ]
    assert replaced == [False, False, True]
    (row,) = rewrite(gm, inputs, Options(tolerance=2**-7).settings).rows
    assert "rounded twice" in row.outcome.note and row.outcome.detail.startswith("they differ by up to 0.00")


def test_a_refusal_names_a_tolerance_that_accepts(fp4_linear, assert_near):
    module, x = Twice(fp4_linear()), X.bfloat16()
    module.layer.factor.fill_(0.0013)
    found, line = through_backend(module, (x,))
    assert torch.equal(found, module(x))
    _, _, shown = line.partition("options={'tolerance': ")
    found, line = through_backend(module, (x,), tolerance=eval(shown.partition("}")[0]))
    assert line.startswith("replaced 1 of 1 FP4 linears")
    assert_near(found, module(x))


def test_a_live_weight_within_the_tolerance_is_packed_again(fp4_linear, assert_near, warned):
    module, x = Twice(fp4_linear()), X.bfloat16()
    run = torch.compile(module, backend="marlin_w4a16", options={"tolerance": 2**-7})
    before = run(x)
    module.layer.codes.copy_(fp4_linear().codes)
    assert_near(run(x), module(x))
    assert (run(x) - before).norm() > 0.1 * before.norm() and not warned()


def dense(n: int = 48, k: int = 64, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A dense linear that holds MXFP4 values."""
    layer = nn.Linear(k, n).to(dtype)
    layer.weight = nn.Parameter(quantize_mxfp4(torch.randn(n, k)).decode(dtype), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dense_weights_of_mxfp4_values_are_recovered(assert_near, dtype):
    layer, x = dense(dtype=dtype), X.to(dtype)
    (row,) = explain(layer, x, options={"recover": True}).rows
    assert isinstance(row.outcome, Replaced) and row.outcome.note is None
    assert (row.path, row.format, row.shape) == ("weight", "MXFP4 group 32", (48, 64))
    assert row.nbytes == layer.weight.nbytes
    found, line = through_backend(layer, (x,), recover=True, verify=True)
    assert line.startswith("replaced 1 of 1 FP4 linears (1 MXFP4 group 32; ")
    assert_near(found, layer(x))


def test_dense_weights_are_no_candidates_by_default():
    assert explain(dense(), X).rows == ()


def test_values_that_bytes_have_a_part_in_are_no_candidates():
    layer = dense()
    layer.mask = nn.Buffer(torch.ones(48, 1, dtype=torch.uint8))
    assert explain(lambda x: linear(x, layer.weight * layer.mask), X, options={"recover": True}).rows == ()


def test_dense_weights_that_are_not_mxfp4_are_refused_at_their_first_difference():
    layer = dense()
    layer.weight[7, 9] = 0.3
    (row,) = explain(layer, X, options={"recover": True}).rows
    assert row.outcome.reason.startswith("it is not MXFP4 group 32: row 7, column 9: expected ")
    assert row.outcome.reason.endswith("found 0.3")


def test_dense_weights_of_other_group_sizes_are_refused():
    layer = nn.Linear(48, 16)
    layer.weight.requires_grad_(False)
    (row,) = explain(layer, X[:, :48], options={"recover": True}).rows
    assert row.outcome.reason == "found k = 48, expected a multiple of the group 32"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_dense_weights_that_are_not_finite_are_refused(value):
    layer = dense()
    layer.weight[7, 9] = value
    (row,) = explain(layer, X, options={"recover": True}).rows
    assert "NaN or Inf" in row.outcome.reason


def test_dense_weights_beside_codes(fp4_linear, assert_near):
    """What is made from codes is recognised as ever, though the option asks for values."""
    model = nn.Sequential(fp4_linear(64, 64), dense(64, 64), nn.Linear(64, 64).requires_grad_(False))
    found = explain(model, X, options={"recover": True})
    assert [row.format for row in found.rows] == ["NVFP4 group 16", "MXFP4 group 32", None]
    assert [type(row.outcome) for row in found.rows] == [Replaced, Replaced, Rejected]
    output, _ = through_backend(model, (X,), recover=True)
    assert_near(output, model(X))


@torch.no_grad()
def test_a_recovered_weight_that_changes_is_recovered_again(assert_near, warned):
    layer = dense()
    run = torch.compile(layer, backend="marlin_w4a16", options={"recover": True})
    before = run(X)
    layer.weight.copy_(dense().weight)
    assert_near(run(X), layer(X))
    assert (run(X) - before).norm() > 0.1 * before.norm() and not warned()


@torch.no_grad()
def test_a_recovered_weight_that_is_no_longer_mxfp4_runs_as_traced(assert_near, warned):
    layer = dense()
    run = torch.compile(layer, backend="marlin_w4a16", options={"recover": True})
    assert_near(run(X), layer(X))
    layer.weight.normal_()
    for _ in range(2):
        assert_near(run(X), layer(X))
    (message,) = warned()
    assert "weight: it is not MXFP4 group 32: row 0, column " in message
    layer.weight.copy_(dense().weight)
    assert_near(run(X), layer(X))
