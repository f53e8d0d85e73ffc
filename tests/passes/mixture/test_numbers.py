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
