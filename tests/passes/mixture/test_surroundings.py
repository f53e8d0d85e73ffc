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
@pytest.mark.parametrize("written", ["tokens", "a view of tokens", "parts of tokens", "weights", "ids"])
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
            elif written == "parts of tokens":
                torch._foreach_mul_(x.chunk(2), 2)
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


def test_scores_that_are_written_on_the_way():
    """Every token goes to all experts, and the op reads the scores where the sum stands."""

    class Dense(Mixture):
        def forward(self, x, weights, ids):
            weights, ids = weights.topk(K)
            scores = torch.zeros(T, E).scatter(1, ids, weights)
            rows = x.expand(E, -1, -1) * scores.t().unsqueeze(-1)
            sums = torch.bmm(rows, self.gate_up_proj.mT)
            if self.writes:
                scores.mul_(2)
            return torch.bmm(halves(sums), self.down_proj.mT).sum(0)

    module = Dense(Parts(batched))
    for module.writes, op in ((False, "moe"), (True, "grouped_linear")):
        assert ops(module, (inputs()[0], torch.randn(T, E), torch.zeros(0))) == {op}


def test_something_on_the_way_that_gets_another_shape_in_place():
    def sums(y: Tensor) -> Tensor:
        y.transpose_(0, 1)
        return y.sum(0)

    assert ops(Totalled(sums, Parts(batched)), inputs()) == {"grouped_linear"}


class Routed(nn.Module):
    """A mixture with its router."""

    def __init__(self, change) -> None:
        super().__init__()
        self.inner, self.change = Mixture(Parts(batched)), change

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = logits.softmax(-1).topk(K)
        return self.inner(x, weights, self.change(weights, ids))


def dropped(weights: Tensor, ids: Tensor) -> Tensor:
    ids[weights < 0.3] = -1
    return ids.clone()


def dropped_through_a_view(weights: Tensor, ids: Tensor) -> Tensor:
    ids.view(-1)[::3].sub_(E)
    return ids.int()


CHOSEN = {"as they are": (lambda w, i: i.clone(), "moe"), "some dropped": (dropped, None)}
CHOSEN["some dropped through a view"] = (dropped_through_a_view, None)


@pytest.mark.parametrize("change, op", CHOSEN.values(), ids=CHOSEN)
def test_ids_that_are_written_are_not_what_was_chosen(change, op):
    """An id below zero is the last expert here, and none where a router is known to choose."""
    module, args = Routed(change), (inputs()[0], torch.randn(T, E))
    found, report = reported(module, args)
    torch.testing.assert_close(found, module(*args), rtol=1e-4, atol=1e-4)
    assert op is None or {row.outcome.op for row in report.rows} == {f"marlin_w4a16::{op}"}


class Two(nn.Module):
    """Two mixtures that are written alike, in one graph."""

    def __init__(self, change, first: Mixture, second: Mixture) -> None:
        super().__init__()
        self.change, self.first, self.second = change, first, second

    def forward(self, *args: Tensor):
        return self.change(self, *args)


def compared(module: nn.Module, args: tuple[Tensor, ...]) -> list[str]:
    """The ops of its mixtures, one after the other; what they give, and its gradients, are what they were."""
    given, again = ([t.clone().detach().requires_grad_(t.requires_grad) for t in args] for _ in range(2))
    found, report = reported(module, tuple(given))
    expected = module(*again)
    gradients = (with_gradients(module, *some) for some in ((found, given), (expected, again)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0), rtol=1e-4, atol=1e-3)
    return [row.outcome.op.partition("::")[2] for row in report.rows[::2]]


def with_gradients(module: nn.Module, found: tuple[Tensor, ...], given: list[Tensor]) -> list[Tensor]:
    wanted = [t for t in (*given, *module.parameters()) if t.requires_grad]
    if not wanted:
        return list(found)
    loss = torch.stack([t.square().sum() for t in found]).sum()
    return [*found, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def test_a_proof_is_not_shared_with_ids_of_no_expert():
    def both(m, x, logits, ids):
        weights, chosen = logits.softmax(-1).topk(K)
        return m.first(x, weights, chosen), m.second(x, weights, ids)

    module = Two(both, Mixture(Parts(batched)), Mixture(Parts(batched)))
    ids = inputs()[2]
    ids[::3, 1] = -1
    compared(module, (inputs()[0], torch.randn(T, E), ids))


def test_a_proof_is_not_shared_with_what_wants_gradients():
    def both(m, x, other, weights, ids):
        return m.first(x, weights, ids), m.second(other, weights, ids) + other

    cut = Parts(batched, after=Tensor.detach)
    x, weights, ids = inputs()
    other = inputs()[0].requires_grad_()
    module = Two(both, Mixture(cut), Mixture(cut))
    assert compared(module, (x, other, weights, ids)) == ["moe", "grouped_linear"]


def test_a_proof_is_not_shared_with_another_autocast():
    def growing(sums: Tensor) -> Tensor:
        gate, up = sums.chunk(2, -1)
        grown = torch.exp(gate.clamp(max=20.0))  # infinite in float16
        return grown / (1 + grown) * gate * up

    def both(m, *args):
        with torch.autocast("cpu", torch.float16):
            second = m.second(*args)
        return m.first(*args), second

    module = Two(both, Mixture(Parts(batched, growing)), Mixture(Parts(batched, growing)))
    assert compared(module, inputs(scale=8.0)) == ["grouped_linear", "moe"]  # the second's rows stand first


@pytest.mark.usefixtures("without_inductor")
def test_a_proof_is_not_shared_with_another_number_of_tokens():
    def both(m, x, weights, ids, *args):
        return m.first(x, weights, ids), m.second(*args)

    rolled = Parts(batched, after=lambda y: y.roll(T * K, 0))
    module, fixed, changing = Two(both, Mixture(rolled), Mixture(rolled)), inputs(), inputs()
    for given in changing:
        torch._dynamo.mark_dynamic(given, 0)
    run = torch.compile(module, backend="marlin_w4a16")
    for more in (changing, inputs(T + 4)):
        for found, expected in zip(run(*fixed, *more), module(*fixed, *more), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


BIASES = {"as they are": (lambda t: t, "moe"), "detached": (Tensor.detach, "grouped_linear")}
BIASES["under no_grad"] = (lambda t: without(t.clone), "grouped_linear")


@pytest.mark.parametrize("cut, op", BIASES.values(), ids=BIASES)
def test_gradients_of_biases_alone(cut, op):
    class Biased(Mixture):
        def total(self, y):
            return cut(y).sum(1)

    def alone(m, *args):
        return (m.first(*args) + m.second.scale,)

    module = Two(alone, Biased(Parts(batched, bias=True)), nn.Module())
    module.second.scale = nn.Parameter(torch.ones(1))
    module.first.bias2.requires_grad_()
    assert compared(module, inputs()) == [op]


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
