"""Numbers that few inputs show: ids of no expert, and what is counted and placed where there are many tokens."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor

from mixtures.noted import note
from mixtures.written import E, K, Mixture, Parts, T, batched, grouped, inputs

OTHER_NUMBERS = {
    "padding of 254": lambda i: torch.where(i == 254, 0, i),
    "padding of -100": lambda i: i.masked_fill(i == -100, 3),
    "modulo": lambda i: i % 99,
    "from 101 on": lambda i: torch.where(i >= 101, i - 101, i),
    "a bit": lambda i: i & ~(1 << 20),
}


@pytest.mark.parametrize("change", OTHER_NUMBERS.values(), ids=OTHER_NUMBERS)
def test_numbers_of_no_expert_that_become_experts(change):
    def flat(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen = change(ids.reshape(-1))
        rows, weight = x.repeat_interleave(K, dim=0), weights.reshape(-1, 1)
        y = m.expert(rows, weight, chosen, lambda x, w: torch.bmm(w[chosen], x.unsqueeze(-1)).squeeze(-1))
        return m.total(y.view(len(x), K, -1))

    assert note(Mixture(Parts(flat))) is not None


FAR_NUMBERS = {
    "the largest": (torch.iinfo(torch.int64).max, lambda i: torch.where(i == torch.iinfo(torch.int64).max, 0, i)),
    "as a fraction": (301, lambda i: torch.where(i == 301.0, 0, i)),
    "doubled": (10001, lambda i: torch.where(i * 2 == 20002, 0, i)),
    "after a sum": (20001, lambda i: torch.where(i + 10001 == 30002, 0, i)),
    "after two sums": (6, lambda i: torch.where((i + 4000) + 50000 == 54006, 0, i)),
    "left over and large": (501003, lambda i: torch.where(((i % 1000) == 3) & (i > 500100), 0, i)),
    "left over from a fraction": (401, lambda i: torch.where((i.float() % 100.25) < 0.1, 0, i)),
    "wrapped round": (torch.iinfo(torch.int32).max, lambda i: torch.where(i.int() + 1 < 0, 0, i)),
}


@pytest.mark.parametrize("number, change", FAR_NUMBERS.values(), ids=FAR_NUMBERS)
def test_numbers_of_no_expert_that_few_look_at(number, change):
    def flat(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return batched(m, x, weights, change(ids.reshape(-1)).view(ids.shape))

    x, weights, ids = inputs()
    ids[::3, 1] = number
    note(Mixture(Parts(flat)), (x, weights, ids))  # which compares


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.uint8])
def test_ids_of_a_router_in_a_narrow_type(dtype):
    module = Mixture(Parts(batched), experts=200)

    def routed(x, logits):
        weights, ids = torch.topk(logits, K)
        return module(x, weights, ids.to(dtype).long())

    note(routed, (torch.randn(T, 64), torch.randn(T, 200)))  # which compares


class Counting(Mixture):
    """A mixture that counts the rows of an expert, and the places of rows, in some type.

    ``moved``: tokens go so many places, of their number, to the experts of others.
    """

    def __init__(self, counts=torch.int32, places=torch.int64, moved=lambda tokens: 0) -> None:
        super().__init__(Parts(grouped))
        self.counts, self.places, self.moved = counts, places, moved

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen, perm = torch.sort(ids.reshape(-1))
        ends = torch.histc(chosen.float(), E, 0, E - 1).cumsum(0, dtype=self.counts).int()
        multiply = torch.ops.transformers.grouped_mm_fallback
        weight = weights.reshape(-1)[perm].unsqueeze(-1)
        y = self.expert(x[perm // K - self.moved(len(x))], weight, chosen, lambda x, w: multiply(x, w.mT, ends))
        inverse = torch.empty_like(perm, dtype=self.places)
        inverse[perm] = torch.arange(perm.size(0), dtype=self.places)
        return self.total(y[inverse.long()].view(len(x), K, -1))


OF_MANY = {
    "a part of the size": (Counting(moved=lambda tokens: tokens // 64), False),
    "what is left of the size": (Counting(moved=lambda tokens: (tokens - 1) % 1), False),
    "counts in bfloat16": (Counting(torch.bfloat16), False),
    "counts in int16": (Counting(torch.int16), False),
    "places in int8": (Counting(places=torch.int8), False),
    "places in float16": (Counting(places=torch.float16), False),
    "both in int32": (Counting(torch.int32, torch.int32), True),
}


@pytest.mark.parametrize("module, whole", OF_MANY.values(), ids=OF_MANY)
def test_what_holds_for_few_tokens_only_is_refused_where_their_number_is_not_fixed(module, whole):
    args = inputs()
    for given in args:
        torch._dynamo.mark_dynamic(given, 0)
    assert (note(module, args) is None) == whole


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_ids_that_are_counted_in_a_narrower_type(dtype):
    """As on a GPU, where `histc` takes int32; what a cast to that type makes of numbers beyond it is not looked at."""

    class Counted(Mixture):
        def forward(self, x, weights, ids):
            chosen, perm = torch.sort(ids.reshape(-1))
            ends = torch.histc(chosen.to(dtype).float(), E, 0, E - 1).cumsum(0, dtype=torch.int32)
            multiply = torch.ops.transformers.grouped_mm_fallback
            weight = weights.reshape(-1)[perm].unsqueeze(-1)
            y = self.expert(x[perm // K], weight, chosen, lambda x, w: multiply(x, w.mT, ends))
            return torch.zeros_like(x).index_add_(0, perm // K, y)

    assert (note(Counted(Parts(grouped))) is None) == (dtype == torch.int32)


def test_ids_of_a_router_that_are_read_in_pairs():
    module = Mixture(Parts(batched), experts=8)

    def routed(x, weights, logits):
        ids = torch.topk(logits, 2 * K)[1].int().view(torch.int64)
        return module(x, weights, ids.reshape(-1).remainder(8).view(ids.shape))

    note(routed, (*inputs()[:2], torch.randn(T, 8)))  # which compares


@pytest.mark.parametrize("form", [batched, grouped])
@pytest.mark.parametrize("changing", [(0,), (1,), (0, 1)])
def test_a_batch_of_sequences_of_any_sizes(form, changing):
    module = Mixture(Parts(form))

    def routed(x, logits):
        weights, ids = logits.view(-1, E).softmax(-1).topk(K)
        return module(x.view(-1, x.shape[-1]), weights, ids).view(x.shape)

    args = torch.randn(2, T, 64), torch.randn(2, T, E)
    for given in args:
        for axis in changing:
            torch._dynamo.mark_dynamic(given, axis)
    assert note(routed, args) is None


@pytest.mark.usefixtures("without_inductor")
def test_sizes_that_vanish_together_at_those_that_are_read():
    module = Mixture(Parts(batched))

    def rolled(x, logits):
        weights, ids = logits.view(-1, E).softmax(-1).topk(K)
        x, moved = x.view(-1, x.shape[-1]), x.shape[0] * T - x.shape[1] * 2
        return module(x[(torch.arange(len(x)) + moved) % len(x)], weights, ids)

    args = torch.randn(2, T, 64), torch.randn(2, T, E)
    for given in args:
        torch._dynamo.mark_dynamic(given, 0)
        torch._dynamo.mark_dynamic(given, 1)
    run = torch.compile(rolled, backend="marlin_w4a16")
    for batch, tokens in ((2, T), (3, 5)):
        args = torch.randn(batch, tokens, 64), torch.randn(batch, tokens, E)
        torch.testing.assert_close(run(*args), rolled(*args), rtol=1e-4, atol=1e-4)


def at_positions(places) -> Parts:
    """A mixture whose rows are those of the tokens at some places."""

    def form(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        chosen, each = ids.reshape(-1), torch.arange(len(x) * K) // K
        rows = x[places(each, len(x))]
        y = m.expert(
            rows, weights.reshape(-1, 1), chosen, lambda x, w: torch.bmm(w[chosen], x.unsqueeze(-1)).squeeze(-1)
        )
        return m.total(y.view(len(x), K, -1))

    return Parts(form)


def summed_into(base) -> Parts:
    """A mixture that is added to something that is zero for few tokens."""

    def form(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        m.base = base(len(x))
        return batched(m, x, weights, ids)

    return Parts(form)


class Based(Mixture):
    def total(self, y: Tensor) -> Tensor:
        tokens = torch.arange(y.shape[0] * K) // K
        return self.base.index_add(0, tokens, y.reshape(-1, y.shape[-1]))


def table() -> Tensor:
    late = torch.zeros(4096, 64)
    late[100:] = 1.0
    return late


vanishing = lambda t: (t - T) * (t - 2 * T) * (t - 3 * T)  # noqa: E731, for as many tokens as are read
PLACES = {
    "as they are": (Mixture(at_positions(lambda p, t: p)), True),
    "a fraction": (Mixture(at_positions(lambda p, t: p - (p * 0.01).long())), False),
    "modulo a tensor": (Mixture(at_positions(lambda p, t: p % torch.tensor(100))), False),
    "modulo a fraction": (Mixture(at_positions(lambda p, t: (p % 100.0).long())), False),
    "of a table": (Mixture(at_positions(lambda p, t: torch.arange(4096).clamp(max=399)[: t * K] // K)), False),
    "by a table": (Mixture(at_positions(lambda p, t: torch.arange(4096).clamp(max=199)[p])), False),
    "halved again and again": (Mixture(at_positions(lambda p, t: p - (p // K // K // K // K // K // K))), False),
    "far beyond": (Mixture(at_positions(lambda p, t: p + (p * 2**56) % K)), False),
    "by a polynomial": (Mixture(at_positions(lambda p, t: (p + vanishing(t)) % t)), False),
    "into zeros": (Based(summed_into(lambda t: torch.zeros(t, 64))), True),
    "into a table": (Based(summed_into(lambda t: table()[:t])), False),
    "into a polynomial": (Based(summed_into(lambda t: torch.zeros(t, 64) + vanishing(t))), False),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_and_numbers_of_more_tokens_than_are_read(name):
    module, whole = PLACES[name]
    args, more = inputs(), inputs(240)
    for given in args:
        torch._dynamo.mark_dynamic(given, 0)
    assert (note(module, args) is None) == whole
    run = torch.compile(module, backend="marlin_w4a16")
    for some in (args, more) if name != "far beyond" else ():  # Inductor's own integers do not wrap round
        assert (run(*some) - module(*some)).norm() <= 1e-5 * module(*some).norm()
