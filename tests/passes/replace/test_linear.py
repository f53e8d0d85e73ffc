import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.kernels.target import Target
from marlin_w4a16.passes.devices import serves
from marlin_w4a16.passes.graph.torch_private import source_name
from marlin_w4a16.passes.live.call import LiveCall, Rewritten
from marlin_w4a16.passes.mixture import stacks
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.rewrite import rewrite, survey

OP = torch.ops.marlin_w4a16.linear.default
ROWS = torch.ones(96, 64)


@pytest.fixture
def block(fp4_linear) -> nn.Module:
    class Block(nn.Module):
        """Two FP4 linears, one of them with a bias, among other layers."""

        def __init__(self):
            super().__init__()
            self.norm, self.dense = nn.RMSNorm(64), nn.Linear(64, 64)
            self.up, self.down = fp4_linear(96, 64), fp4_linear(64, 96)
            self.bias = nn.Parameter(torch.randn(96))

        def forward(self, x: Tensor) -> Tensor:
            h = linear(self.norm(x), self.up.weight(), self.bias).relu()
            return self.dense(x) + self.down(h)

    return Block()


def run(rewritten: Rewritten, inputs: list) -> Tensor:
    return LiveCall(rewritten.graph, None, rewritten)(*inputs)[0]


def layout(value: Tensor) -> tuple:
    return value.shape, value.stride(), value.dtype, value.device, value.requires_grad


def results(graph, target) -> list[tuple]:
    return [layout(n.meta["example_value"]) for n in graph.nodes if n.target is target]


def test_only_the_dequantisation_goes_and_only_the_op_comes(trace, block):
    gm, inputs = trace(block, torch.randn(3, 64))
    assert [n.target for n in gm.graph.nodes].count(linear) == 3
    found = [n.target for n in rewrite(gm, inputs).graph.graph.nodes if n.op.startswith("call_")]
    assert found == [torch.rms_norm, OP, "relu", linear, OP, operator.add]


def test_the_graph_takes_what_it_still_uses_and_three_tensors_a_weight(trace, block):
    gm, inputs = trace(block, torch.randn(3, 64))
    rewritten = rewrite(gm, inputs)
    placeholders = rewritten.graph.graph.find_nodes(op="placeholder")
    assert all(n.users for n in placeholders)
    assert [n.meta["example_value"].shape for n in placeholders] == [t.shape for t in rewritten.inputs]
    kept = {id(t) for t in rewritten.inputs[: len(rewritten.kept)]}
    assert kept == {id(inputs[i]) for i in rewritten.kept}
    assert kept >= {id(t) for t in (block.norm.weight, block.dense.weight, block.dense.bias, block.bias)}
    assert len(kept) == 5 and len(placeholders) == 5 + 2 * 3


def test_packed_tensors_are_static_inputs_of_sources_of_their_own(trace, block):
    gm, inputs = trace(block, torch.randn(3, 64))
    rewritten = rewrite(gm, inputs)
    placeholders = list(rewritten.graph.graph.find_nodes(op="placeholder"))
    for node in placeholders[len(rewritten.kept) :]:
        assert node.meta["tensor_dict"]["_dynamo_static_input_type"] == "unguarded"
    assert len({source_name(n) for n in placeholders}) == len(placeholders)


def test_the_traced_graph_is_left_as_it_was(trace, block):
    gm, inputs = trace(block, torch.randn(3, 64))
    before, expected = str(gm.graph), gm(*inputs)[0]
    rewrite(gm, inputs)
    assert str(gm.graph) == before and torch.equal(gm(*inputs)[0], expected)


def test_the_rewritten_graph_computes_the_same(trace, block, assert_near):
    gm, inputs = trace(block, torch.randn(3, 64))
    assert_near(run(rewrite(gm, inputs), inputs), gm(*inputs)[0])


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_op_has_the_example_value_of_the_product(trace, fp4_linear, leading, needs_grad):
    gm, inputs = trace(fp4_linear(), torch.randn(*leading, 64, requires_grad=needs_grad))
    assert results(rewrite(gm, inputs).graph.graph, OP) == results(gm.graph, linear)


def test_the_op_has_the_symbolic_shape_of_the_product(trace, fp4_linear):
    x = torch.randn(5, 64)
    torch._dynamo.mark_dynamic(x, 0)
    gm, inputs = trace(fp4_linear(), x)
    ((shape, *_),) = results(rewrite(gm, inputs).graph.graph, OP)
    assert isinstance(shape[0], torch.SymInt) and shape == results(gm.graph, linear)[0][0]


@pytest.mark.parametrize("inside", [False, True])
def test_the_op_has_the_dtype_that_autocast_gives_the_product(trace, fp4_linear, inside):
    module = fp4_linear()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return module(x)

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
        gm, inputs = trace(function if inside else module, torch.randn(3, 64))
        found = results(rewrite(gm, inputs).graph.graph, OP)
    assert found == results(gm.graph, linear) and found[0][2] == torch.bfloat16


def test_a_module_called_twice_is_packed_once(trace, fp4_linear):
    module = fp4_linear(64, 64)
    rewritten = rewrite(*trace(lambda x: module(module(x)), torch.randn(3, 64)))
    assert len(rewritten.bound) == 1 and [row.uses for row in rewritten.rows] == [2]


def test_a_weight_of_two_products_is_packed_once(trace, fp4_linear):
    module = fp4_linear()

    def function(x: Tensor) -> Tensor:
        weight = module.weight()
        return linear(x, weight) + linear(x * 2, weight)

    rewritten = rewrite(*trace(function, torch.randn(3, 64)))
    assert len(rewritten.bound) == 1 and [row.uses for row in rewritten.rows] == [2]


def test_a_weight_that_something_else_reads_too_stays(trace, fp4_linear, assert_near):
    module = fp4_linear()

    def function(x: Tensor) -> Tensor:
        weight = module.weight()
        return linear(x, weight) + weight.sum()

    gm, inputs = trace(function, torch.randn(3, 64))
    rewritten = rewrite(gm, inputs)
    found = [n.target for n in rewritten.graph.graph.nodes]
    assert OP in found and linear not in found and "sum" in found
    assert_near(run(rewritten, inputs), gm(*inputs)[0])


def test_a_weight_changed_between_two_products_is_judged_at_each(trace, fp4_linear, assert_near):
    module = fp4_linear()

    def function(x: Tensor) -> Tensor:
        weight = module.weight()
        first = linear(x, weight)
        weight.mul_(2)
        return first + linear(x, weight)

    gm, inputs = trace(function, torch.randn(3, 64))
    rewritten = rewrite(gm, inputs)
    assert [isinstance(row.outcome, Rejected) for row in rewritten.rows] == [False, True]
    assert_near(run(rewritten, inputs), gm(*inputs)[0])


def test_a_survey_says_the_same_and_packs_nothing(trace, block, monkeypatch):
    gm, inputs = trace(block, torch.randn(3, 64))
    done = rewrite(gm, inputs).rows
    monkeypatch.setattr(stacks, "pack", None)
    monkeypatch.setattr(stacks, "pack_into", None)
    assert survey(gm, inputs) == done
    assert [(r.path, r.shape, r.format) for r in done] == [
        ("up.codes", (96, 64), "NVFP4 group 16"),
        ("down.codes", (64, 96), "NVFP4 group 16"),
    ]
    assert [r.outcome.nbytes for r in done] == [pack(w).nbytes for w in map(quantize_nvfp4, (ROWS, ROWS.T))]


def test_a_survey_says_what_does_not_fit_the_dtype_of_the_product(trace, fp4_linear):
    module = fp4_linear(48, 64, lambda dense: quantize_mxfp4(dense * torch.tensor([1, 2.0**-60]).repeat_interleave(32)))
    with torch.autocast("cpu", dtype=torch.float16):
        gm, inputs = trace(module, torch.randn(3, 64))
        (row,) = rewrite(gm, inputs).rows
        assert "holds powers of two from" in row.outcome.reason and survey(gm, inputs) == (row,)


@pytest.mark.parametrize(
    "product",
    [lambda x, w: torch.einsum("bk,nk->bn", x, w), lambda x, w: torch.tensordot(x, w, dims=([1], [1]))],
    ids=["einsum", "tensordot"],
)
def test_an_input_that_is_broadcast_along_the_columns(trace, fp4_linear, assert_near, product):
    module = fp4_linear()
    gm, inputs = trace(lambda x: product(x, module.weight()), torch.randn(3, 1))
    rewritten = rewrite(gm, inputs)
    found = run(rewritten, inputs) if rewritten.bound else rewritten.graph(*inputs)[0]
    assert_near(found, gm(*inputs)[0])


def test_weights_without_values_are_refused(trace, fp4_linear):
    gm, _ = trace(fp4_linear(), torch.randn(3, 64))
    (row,) = rewrite(gm, [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]).rows
    assert row.outcome == Rejected("the weights hold no values while this graph is compiled")


def test_a_dequantisation_that_raises_is_refused(trace, fp4_linear):
    module = fp4_linear()
    gm, inputs = trace(module, torch.randn(3, 64))
    inputs = [torch.zeros(1) if t is module.table else t for t in inputs]
    (row,) = rewrite(gm, inputs).rows
    assert row.outcome.reason.startswith("its traced operations raise IndexError: index ")


CAPABILITIES = {
    (7, 5): "the kernels need 8.0", (8, 0): None, (8, 6): None, (8, 9): None, (9, 0): None,
    (10, 0): "FP4 tensor cores", (12, 0): "FP4 tensor cores",
}  # fmt: skip


@pytest.mark.parametrize("capability, reason", CAPABILITIES.items())
def test_triton_serves_capabilities_from_8_to_below_10(monkeypatch, capability, reason):
    monkeypatch.setattr(Target, "of", lambda device: Target(capability, 1))
    served = serves(torch.device("cuda", 1))
    if reason is None:
        assert served == "Triton"
    else:
        assert reason in served.reason and "{}.{}".format(*capability) in served.reason


def test_other_devices_are_left_alone():
    assert serves(torch.device("cpu")) == "CPU blocks"
    assert serves(torch.device("xpu")) == Rejected("device xpu: expected cuda or cpu")
