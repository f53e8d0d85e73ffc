"""A mixture is computed where its sum stands: what happens around it until then is seen."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor, nn

from marlin_w4a16.passes.outcome import Replaced
from mixtures.written import E, H, K, Mixture, Parts, T, batched, grouped, halves, inputs
from programs.backend import reported

FORMS = pytest.mark.parametrize("form", [batched, grouped])


class Around(nn.Module):
    """A mixture, and what is done with its inputs and its sum; the products of both are in one graph."""

    def __init__(self, change, parts: Parts, **more) -> None:
        super().__init__()
        self.inner, self.change = Mixture(parts, **more), change

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return self.change(self, x, weights, ids)


class Totalled(Mixture):
    """A mixture whose sum is made by a function of the pairs."""

    def __init__(self, sums, parts: Parts) -> None:
        super().__init__(parts)
        self.sums = sums

    def total(self, y: Tensor) -> Tensor:
        return self.sums(y)


def ops(module: nn.Module, args: tuple[Tensor, ...]) -> set[str]:
    """The ops that replaced its products; it gives what it gave, and leaves its inputs as it left them."""
    given, again = [t.clone() for t in args], [t.clone() for t in args]
    found, report = reported(module, tuple(given))
    expected = module(*again)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert all(map(torch.equal, given, again))
    return {row.outcome.op.partition("::")[2] for row in report.rows if isinstance(row.outcome, Replaced)}


def tokens_after(m, x, weights, ids):
    y = m.inner(x, weights, ids)
    x.add_(1.0)
    return y


def tokens_before(m, x, weights, ids):
    x.add_(1.0)
    return m.inner(x, weights, ids)


@FORMS
@pytest.mark.parametrize("change, op", [(tokens_after, "moe"), (tokens_before, "grouped_linear")])
def test_what_it_reads_may_be_written_before_and_after(form, change, op):
    assert ops(Around(change, Parts(form)), inputs()) == {op}


@FORMS
@pytest.mark.parametrize("written", ["tokens", "a view of tokens", "weights", "ids"])
def test_what_it_reads_is_not_written_on_the_way(form, written):
    class Writing(Mixture):
        def forward(self, x, weights, ids):
            self.given = x, weights, ids
            return super().forward(x, weights, ids) + x

        def total(self, y):
            x, weights, ids = self.given
            if written == "tokens":
                x.add_(1.0)
            elif written == "a view of tokens":
                x.view(-1)[:100].mul_(2)
            elif written == "weights":
                weights.div_(weights.sum())
            else:
                ids.zero_()
            return y.sum(1)

    assert ops(Writing(Parts(form)), inputs()) == {"grouped_linear"}


def added_to(shape, part):
    """The sum, added to a part of zeros, all of which is the result."""

    def sums(y: Tensor) -> Tensor:
        whole = torch.zeros(shape)
        part(whole).index_add_(0, torch.arange(T).repeat_interleave(K), y.flatten(0, 1))
        return whole

    return sums


PARTS = {
    "more rows": ((T + 1, H), lambda whole: whole[:T]),
    "the second half": ((2 * T, H), lambda whole: whole[T:]),
    "the first columns": ((T, 2 * H), lambda whole: whole[:, :H]),
    "transposed": ((H, T), Tensor.t),
    "one more axis": ((1, T, H), lambda whole: whole.view(-1, H)),
    "one of two": ((2, T, H), lambda whole: whole[1]),
}


@pytest.mark.parametrize("shape, part", PARTS.values(), ids=PARTS)
def test_a_sum_in_a_part_of_something_larger(shape, part):
    assert ops(Totalled(added_to(shape, part), Parts(batched)), inputs()) == {"grouped_linear"}


def test_a_sum_in_a_tensor_of_its_own():
    assert ops(Totalled(added_to((T, H), lambda whole: whole), Parts(batched)), inputs()) == {"moe"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_around_the_sum_alone(dtype):
    def sums(y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return y.sum(1)

    assert ops(Totalled(sums, Parts(batched)), inputs(scale=1e5)) == {"grouped_linear"}


def test_one_expert_is_no_stack():
    x, weights, _ = inputs()
    for form in (batched, grouped):
        assert not ops(Mixture(Parts(form), experts=1), (x, weights, torch.zeros(T, K, dtype=torch.int64)))


def test_rows_whose_number_data_tell():
    class Repeated(Mixture):
        def forward(self, x, weights, ids):
            chosen, perm = torch.sort(ids.reshape(-1))
            rows = x.repeat_interleave(torch.full((len(x),), K), 0)[perm]
            ends = torch.histc(chosen.float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
            weight = weights.reshape(-1)[perm].unsqueeze(-1)
            multiply = torch.ops.transformers.grouped_mm_fallback
            y = self.expert(rows, weight, chosen, lambda x, w: multiply(x, w.mT, ends))
            return torch.zeros_like(x).index_add_(0, perm // K, y)

    assert ops(Repeated(Parts(grouped)), inputs()) == {"grouped_linear"}


def test_float16_experts_summed_in_float32():
    module = Mixture(Parts(batched), dtype=torch.float16)
    x, weights, ids = inputs(dtype=torch.float16, scale=0.5)
    found, report = reported(module, (x, weights.float(), ids))
    expected = module(x, weights.float(), ids)
    assert found.dtype == expected.dtype == torch.float32 and (found - expected).norm() <= 2e-3 * expected.norm()
    assert {row.outcome.op for row in report.rows} == {"marlin_w4a16::grouped_linear"}


def without(function):
    with torch.no_grad():
        return function()


CUT = {
    "nothing": ({}, "moe"),
    "routing weights": ({"route": Tensor.detach}, "grouped_linear"),
    "gates": ({"activation": lambda s: halves(s).detach()}, "grouped_linear"),
    "a region": ({"activation": lambda s: without(lambda: halves(s))}, "grouped_linear"),
}


@pytest.mark.parametrize("parts, op", CUT.values(), ids=CUT)
def test_gradients_that_are_cut_on_the_way(parts, op):
    module, (x, weights, ids) = Mixture(Parts(batched, **parts)), inputs()
    gradients = []
    for run in (lambda *args: reported(module, args), lambda *args: (module(*args), None)):
        given = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out, report = run(*given, ids)
        out.square().sum().backward()
        gradients.append([torch.zeros(1) if t.grad is None else t.grad for t in given])
        if report is not None:
            assert {row.outcome.op for row in report.rows} == {f"marlin_w4a16::{op}"}
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
