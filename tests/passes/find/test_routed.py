"""Products with a stack of FP4 matrices: sorted, gathered and batched rows, each as one op on one packed stack."""

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor, nn

from marlin_w4a16 import explain, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.options import Options
from marlin_w4a16.passes.outcome import Excluded, Rejected, Replaced
from marlin_w4a16.passes.rewrite import rewrite
from mixtures.experts import hold_fp4
from narrow import wide
from programs.backend import reported

E, N, K, S = 5, 48, 64, 9
OP = torch.ops.marlin_w4a16.grouped_linear.default


class Stack(nn.Module):
    """A stack ``[experts, n, k]``, or ``[experts, k, n]``, that holds FP4."""

    def __init__(self, multiply: Callable[..., Tensor], transposed: bool = False, quantize=quantize_nvfp4, dtype=None):
        super().__init__()
        self.multiply = multiply
        shape = (E, K, N) if transposed else (E, N, K)
        self.up_proj = nn.Parameter(torch.randn(shape, dtype=dtype), requires_grad=False)
        hold_fp4(self, quantize, transposed=transposed)

    def forward(self, *args: Tensor) -> Tensor:
        return self.multiply(self.up_proj, *args)


def ids(*shape: int) -> Tensor:
    return torch.randint(E, shape)


def fallback(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.transformers.grouped_mm_fallback(x, w, offsets)


def native(w: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x.bfloat16(), w, offs=offsets)


X, ENDS = (S, K), torch.tensor([2, 2, 5, 5, 9], dtype=torch.int32)
SORTED = {
    "fallback": (fallback, True),
    "fallback, transposed": (lambda w, *args: fallback(w.transpose(-2, -1), *args), False),
    "by keywords": (lambda w, x, o: torch.ops.transformers.grouped_mm_fallback(weight=w, offs=o, input=x), True),
    "grouped_mm": (native, True),
    "grouped_mm, transposed": (lambda w, *args: native(w.mT, *args), False),
    "ends that the graph computes": (lambda w, x, o: fallback(w, x, torch.cumsum(o.diff(prepend=o[:1] * 0), 0)), True),
}
GATHERED = {
    "bmm of a vector": (lambda w, x, i: torch.bmm(w[i], x.unsqueeze(-1)).squeeze(-1), False, (S,)),
    "bmm by a row": (lambda w, x, i: torch.bmm(x.unsqueeze(1), w[i]).squeeze(1), True, (S,)),
    "index_select": (lambda w, x, i: torch.bmm(x.unsqueeze(1), torch.index_select(w, 0, i)), True, (S,)),
    "index_select as a method": (lambda w, x, i: x.unsqueeze(1) @ w.index_select(0, i), True, (S,)),
    "in a tuple": (lambda w, x, i: x.unsqueeze(1) @ w[(i,)], True, (S,)),
    "einsum": (lambda w, x, i: torch.einsum("sk,snk->sn", x, w[i]), False, (S,)),
    "einsum, two axes": (lambda w, x, i: torch.einsum("stk,stnk->stn", x.view(3, 3, K), w[i]), False, (3, 3)),
    "several rows an id": (lambda w, x, i: torch.bmm(x.view(3, 3, K), w[i]), True, (3,)),
    "one id": (lambda w, x, i: torch.bmm(x.unsqueeze(0), w[i]), True, (1,)),
    "ids from the end": (lambda w, x, i: x.unsqueeze(1) @ w[i - E], True, (S,)),
}
BATCHED = {
    "bmm": (lambda w, x: torch.bmm(x, w), True, (E, 3, K)),
    "bmm, transposed": (lambda w, x: torch.bmm(x, w.mT), False, (E, 3, K)),
    "of as many rows as matrices": (lambda w, x: torch.einsum("ek,enk->en", x, w), False, (E, K)),
    "rows before matrices": (lambda w, x: torch.einsum("sek,enk->sen", x, w), False, (3, E, K)),
    "two free axes": (lambda w, x: torch.einsum("stek,enk->tesn", x, w), False, (2, 3, E, K)),
    "baddbmm": (lambda w, x: torch.baddbmm(x.sum(-1, keepdim=True), x, w), True, (E, 3, K)),
}


def traced(module: nn.Module, args: tuple) -> tuple:
    calls = []
    torch._dynamo.reset()
    torch.compile(module, backend=lambda gm, given: calls.append((gm, given)) or gm.forward, fullgraph=True)(*args)
    return calls[0]


def assert_one_op(module: nn.Module, args: tuple, tolerance: float = 1e-5) -> None:
    """It is replaced by one op on one stack, computes the same, and nothing of the dense stack is left."""
    rewritten = rewrite(*traced(module, args), Options(verify=True).settings)
    (row,) = rewritten.rows
    assert isinstance(row.outcome, Replaced) and row.outcome.op == "marlin_w4a16::grouped_linear", row
    assert row.shape == (E, N, K) and row.outcome.error < tolerance and row.outcome.note is None
    targets = [node.target for node in rewritten.graph.graph.nodes]
    assert targets.count(OP) == 1 and len(rewritten.inputs) == len(args) + 3
    torch._dynamo.reset()
    with patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward):
        found = torch.compile(module, backend="marlin_w4a16", fullgraph=True)(*args)
    expected = module(*args)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("multiply, transposed", SORTED.values(), ids=SORTED)
def test_sorted_rows(multiply, transposed):
    is_native = multiply is native or "native" in multiply.__code__.co_names
    module = Stack(multiply, transposed, dtype=torch.bfloat16 if is_native else torch.float32)
    assert_one_op(module, (torch.randn(X), ENDS), 1e-2 if is_native else 1e-5)


@pytest.mark.parametrize("multiply, transposed, shape", GATHERED.values(), ids=GATHERED)
@pytest.mark.parametrize("quantize", [quantize_nvfp4, wide(quantize_mxfp4)])
def test_gathered_matrices(multiply, transposed, shape, quantize):
    assert_one_op(Stack(multiply, transposed, quantize), (torch.randn(X), ids(*shape)))


@pytest.mark.parametrize("multiply, transposed, shape", BATCHED.values(), ids=BATCHED)
def test_batches(multiply, transposed, shape):
    assert_one_op(Stack(multiply, transposed), (torch.randn(shape),))


@pytest.mark.parametrize("name", ["sorted", "gathered", "batched"])
def test_dynamic_rows_through_inductor(name):
    multiply, transposed, *_ = {"sorted": SORTED["fallback"], "gathered": GATHERED["bmm of a vector"],
                                "batched": BATCHED["bmm"]}[name]  # fmt: skip
    module = Stack(multiply, transposed)
    run = torch.compile(module, backend="marlin_w4a16", fullgraph=True)
    for rows in (7, 12, 3):
        x = torch.randn(E, rows, K) if name == "batched" else torch.randn(rows, K)
        more = {"sorted": (torch.linspace(0, rows, E).int(),), "gathered": (ids(rows),), "batched": ()}[name]
        torch._dynamo.mark_dynamic(x, 1 if name == "batched" else 0)
        if name == "gathered":
            torch._dynamo.mark_dynamic(more[0], 0)
        torch.testing.assert_close(run(x, *more), module(x, *more), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_inductor")
def test_gradients_of_gathered_rows():
    module, i = Stack(GATHERED["bmm of a vector"][0]), ids(S)
    run, gradients = torch.compile(module, backend="marlin_w4a16", fullgraph=True), []
    data = torch.randn(X)
    for function in (module, run):
        x = data.clone().requires_grad_()
        function(x, i).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


def test_in_autocast():
    def multiply(w: Tensor, x: Tensor, i: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.bmm(x.unsqueeze(1), w[i]).squeeze(1)

    assert_one_op(Stack(multiply, True), (torch.randn(X), ids(S)), 1e-2)


def _writing(w, x, i):
    chosen = w[i]
    chosen[:, 0] = 0
    return torch.einsum("sk,snk->sn", x, chosen)


def _writing_ids(w, x, i):
    i = i.clone()
    chosen = w[i]
    i.zero_()
    return torch.einsum("sk,snk->sn", x, chosen)


def _written_before(w, x, i):
    i = i.clone()
    i.zero_()
    return torch.einsum("sk,snk->sn", x, w[i])


@pytest.mark.parametrize("multiply, left", [(_writing, True), (_writing_ids, True), (_written_before, False)])
def test_matrices_or_ids_that_are_written_once_they_are_gathered(multiply, left):
    module, args = Stack(multiply), (torch.randn(X), ids(S))
    found, report = reported(module, args)
    (row,) = report.rows
    assert isinstance(row.outcome, Rejected) == left and (not left or "once they are gathered" in row.outcome.reason)
    torch.testing.assert_close(found, module(*args), rtol=1e-4, atol=1e-4)


def test_matrices_that_are_transposed_after_they_are_gathered_are_no_candidate():
    module = Stack(lambda w, x, i: torch.bmm(x.unsqueeze(1), w[i].mT))
    args = torch.randn(X), ids(S)
    assert explain(module, *args).rows == ()
    with patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward):
        assert torch.equal(torch.compile(module, backend="marlin_w4a16")(*args), module(*args))


def test_a_stack_that_is_no_fp4_is_left_with_its_reason():
    module = Stack(*SORTED["fallback"])
    module.table[3] = 1.3
    (row,) = explain(module, torch.randn(X), ENDS).rows
    assert isinstance(row.outcome, Rejected) and row.shape == (E, N, K)


def test_the_option_grouped_leaves_stacks_alone():
    (row,) = explain(Stack(*BATCHED["bmm"][:2]), torch.randn(E, 3, K), options={"grouped": False}).rows
    assert row.outcome == Excluded("options={'grouped': False}")


def test_the_option_linear_leaves_linears_alone(fp4_linear):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.stack = fp4_linear(K, K), Stack(*BATCHED["bmm"][:2])

        def forward(self, x: Tensor) -> Tensor:
            return self.stack(self.linear(x))

    rows = explain(Both(), torch.randn(E, 3, K), options={"linear": False}).rows
    assert [(row.path, type(row.outcome)) for row in rows] == [
        ("linear.codes", Excluded),
        ("stack.up_proj_codes", Replaced),
    ]
