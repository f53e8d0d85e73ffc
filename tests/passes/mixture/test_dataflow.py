"""Mixtures are read operation by operation: what changes one for some input is refused, by the operation's name."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor

from marlin_w4a16.passes.mixture import candidates
from marlin_w4a16.passes.mixture.pointwise import Bends
from marlin_w4a16.passes.mixture.values import Between, NotUnderstood
from marlin_w4a16.passes.rewrite import rewrite
from mixtures.noted import note
from mixtures.written import E, K, Mixture, Parts, T, added, batched, einsum, grouped, halves, inputs


class Changed(Mixture):
    """A mixture in which one step is another: ``pairs`` of the results of pairs, ``rows`` of tokens."""

    def __init__(self, form=batched, ids=None, pairs=None, rows=None, total=None, **parts):
        super().__init__(replace(Parts(form), **parts))
        self.ids, self.pairs, self.rows, self.sums = ids, pairs, rows, total

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return super().forward(x, weights, ids if self.ids is None else self.ids(ids))

    def expert(self, x, weight, chosen, multiply):
        if self.rows is not None:
            x = self.rows(x, chosen)
        y = super().expert(x, weight, chosen, multiply)
        return y if self.pairs is None else self.pairs(y, chosen)

    def total(self, y: Tensor) -> Tensor:
        return super().total(y) if self.sums is None else self.sums(y)


def of(chosen: Tensor, number: int) -> Tensor:
    return (chosen == number)[:, None]


CHANGED = {
    "routing weights below a limit": ({"route": lambda w: torch.where(w < 0.3, 0.0, w)}, "lt of its routing weights"),
    "routing weights limited": ({"route": lambda w: w.clamp(min=0.2)}, "clamp of its routing weights"),
    "routing weights without sign": ({"route": torch.abs}, "abs of its routing weights"),
    "routing weights in half": ({"route": lambda w: w.half().float()}, "a cast of its routing weights to float16"),
    "routing weights normalised": ({"route": lambda w: w / w.sum()}, "sum of its routing weights"),
    "one expert adds nothing": ({"pairs": lambda y, c: y.masked_fill(of(c, 3), 0.0)},
     "a mask of what its experts give by expert"),
    "one expert counts half": ({"pairs": lambda y, c: y * torch.where(of(c, 3), 0.5, 1.0)},
     "mul of what its experts give and its experts' ids"),
    "one expert has no tokens": ({"rows": lambda x, c: x.masked_fill(of(c, 3), 0.0)}, "a mask of its tokens by expert"),
    "the last expert is another": ({"ids": lambda i: i.clamp(max=E - 2)}, "whole"),
    "the next expert": ({"ids": lambda i: (i + 1) % E}, "whole"),
    "experts by choice": ({"ids": lambda i: (i + torch.arange(K)) % E}, "whole"),
    "experts in another order": ({"ids": lambda i: i.flip(1)}, "whole"),
    "a result limited": ({"pairs": lambda y, _: y.clamp(-65504.0, 65504.0)}, "clamp of what its experts give"),
    "a sum limited": ({"total": lambda y: y.sum(1).clamp(-1e4, 1e4)}, None),  # outside of it
    "a sum without NaN": ({"total": lambda y: torch.nan_to_num(y.sum(1))}, None),
    "a result in half": ({"pairs": lambda y, _: y.half().float()}, "a cast of what its experts give to float16"),
    "a token limited": ({"rows": lambda x, _: x.clamp(-1e4, 1e4)}, "clamp of its tokens"),
    "a token in half": ({"rows": lambda x, _: x.half().float()}, "a cast of its tokens to float16"),
    "a token doubled": ({"rows": lambda x, _: x * 2}, "mul of its tokens"),
    "every second token": ({"rows": lambda x, _: x * (torch.arange(len(x)) % 2)[:, None]}, "mul of its tokens and pos"),
    "tokens of others": ({"rows": lambda x, _: x.roll(K, 0)}, "tokens that go to the experts of others"),
    "columns of tokens": ({"rows": lambda x, _: x.flip(1)}, "tokens whose columns were moved"),
    "the first choice counts most": ({"total": lambda y: (y * torch.tensor([1.0, 0.5])[:, None]).sum(1)},
     "mul of what its experts give and positions"),
    "the first choice alone": ({"total": lambda y: y[:, 0]}, None),
    "a choice twice": ({"total": lambda y: y[:, [0, 0]].sum(1)}, "not over all choices of a token"),
    "the mean": ({"total": lambda y: y.mean(1)}, "mean of what its experts give"),
    "positions": ({"pairs": lambda y, _: torch.where(torch.arange(len(y))[:, None] > 9, 0.0, y)},
     "a mask of what its experts give"),
    "a limit of a product": ({"activation": lambda s: halves(s).clamp(max=50.0)}, "more than a polynomial of one sum"),
    "a soft limit": ({"activation": lambda s: 1e3 * torch.tanh(halves(s) / 1e3)}, "tanh of what stands between"),
    "a comparison": ({"activation": lambda s: torch.where(s.chunk(2, -1)[0] * 1e-3 > 1, 0.0, halves(s))},
     "gt of what stands between its products"),
    "a limit in a tensor": ({"activation": lambda s: F.silu(torch.minimum(s.chunk(2, -1)[0], torch.tensor(300.0)))
                             * s.chunk(2, -1)[1]}, "whole"),
    "limits by column": ({"activation": lambda s: torch.minimum(halves(s), torch.linspace(1, 99, 96))},
     "numbers that differ from column to column"),
    "gates of the next column": ({"activation": lambda s: F.silu(s.chunk(2, -1)[0]) * s.chunk(2, -1)[1].roll(1, -1)},
     "neither halves nor side by side"),
    "ups of the next token": ({"activation": lambda s: F.silu(s.chunk(2, -1)[0]) * s.chunk(2, -1)[1].roll(1, 0)},
     "columns that are paired in several ways"),
    "a sum of a row": ({"activation": lambda s: halves(s) / s.abs().sum(-1, True)}, "abs of what stands between"),
    "rounded": ({"activation": lambda s: halves(s).round()}, "round"),
    "a softmax": ({"activation": lambda s: F.softmax(s.chunk(2, -1)[0], -1) * s.chunk(2, -1)[1]}, "softmax"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_not_understood_is_refused_by_its_name(name):
    changed, why = CHANGED[name]
    torch.manual_seed(0)
    found = note(Changed(**changed))
    if why == "whole":
        assert found is None
    elif why is not None:
        assert found.startswith("no whole mixture: ") and why in found
    else:
        assert found is None or "no whole mixture" in found


@pytest.mark.parametrize("form", [grouped, added])
def test_what_counts_the_tokens_of_an_expert_is_refused(form):
    def capacity(y: Tensor, chosen: Tensor) -> Tensor:
        before = (chosen[:, None] == chosen[None, :]).int().cumsum(1).diagonal() - 1
        return torch.where((before >= 2)[:, None], torch.zeros_like(y), y)

    assert "that are sorted by expert" in note(Changed(form, pairs=capacity))
    assert "eq of the ids of several pairs" in note(Changed(batched, pairs=capacity))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("form", [grouped, batched])
def test_a_limit_on_positions_is_refused_where_the_number_of_tokens_is_not_fixed(form):
    module = Changed(form, total=lambda y: torch.where(torch.arange(len(y))[:, None, None] > 20, 0.0, y).sum(1))
    compiled = torch.compile(module, backend="marlin_w4a16", fullgraph=True, dynamic=True)
    for tokens in (5, 64):
        args = inputs(tokens)
        torch.testing.assert_close(compiled(*args), module(*args), rtol=1e-4, atol=1e-4)


def test_rows_of_a_mixture_of_any_number_of_tokens_may_not_be_cut():
    module, args = Changed(rows=lambda x, _: torch.cat((x[:30], 2 * x[30:]))), inputs()
    for given in args:
        torch._dynamo.mark_dynamic(given, 0)
    assert note(module, args) is not None


def scattered(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorted by expert, and put back by a write."""
    chosen, perm = torch.sort(ids.flatten(), stable=True)
    offsets = torch.cumsum(torch.histc(chosen.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
    multiply = torch.ops.transformers.grouped_mm_fallback
    weight = weights.flatten().index_select(0, perm)[:, None]
    y = m.expert(x.index_select(0, perm // K), weight, chosen, lambda x, w: multiply(x, w.mT, offsets))
    out = torch.empty_like(y)
    out[perm] = y
    return m.total(out.unflatten(0, (-1, K)))


def argsorted(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Sorted by expert, and put back by the argsort of an argsort."""
    perm = torch.argsort(ids.reshape(-1))
    chosen = ids.reshape(-1)[perm]
    offsets = torch.histc(chosen.float(), bins=E, min=0, max=E - 1).to(torch.int32).cumsum(0, dtype=torch.int32)
    multiply = torch.ops.transformers.grouped_mm_fallback
    weight = weights.view(-1, 1)[perm]
    y = m.expert(x[torch.floor_divide(perm, K)], weight, chosen, lambda x, w: multiply(x, w.mT, offsets))
    return m.total(y[torch.argsort(perm)].view(-1, K, y.shape[-1]))


def spread(m: Mixture, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Every expert for every token, with routing weights of zero where it was not chosen."""
    scores = torch.zeros(len(x), E).scatter(1, ids, weights)
    rows = x.repeat(E, 1).view(E, len(x), -1)
    y = m.expert(rows, scores.t().unsqueeze(-1), None, lambda x, w: torch.bmm(x, w.mT))
    return y.sum(0)


SPELLED = {
    "put back by a write": (Changed(scattered), None), "put back by argsort": (Changed(argsorted), None),
    "masks of no expert": (Changed(pairs=lambda y, c: torch.where((c < 0)[:, None], 0.0, y)), None),
    "a mask of some numbers of no expert": (Changed(pairs=lambda y, c: torch.where(of(c, -1), 0.0, y)),
     "ids of no expert that add something"),
    "ids from the end": (Changed(ids=lambda i: i - E), None), "ids within": (Changed(ids=lambda i: i % E), None),
    "ids negated twice": (Changed(ids=lambda i: 0 - (-i)), None),
    "ids in 32 bits": (Changed(ids=lambda i: i.int()), None),
    "silu by exp": (Changed(activation=lambda s: s.chunk(2, -1)[0] / (1 + torch.exp(-s.chunk(2, -1)[0]))
                            * s.chunk(2, -1)[1]), None),
    "a limit of what is scaled": (Changed(activation=lambda s: F.silu((2 * s.chunk(2, -1)[0]).clamp(max=14) / 2)
                                          * s.chunk(2, -1)[1]), None),
    "in double": (Changed(activation=lambda s: halves(s.double()).float()), None),
    "no activation of the op": (Changed(activation=lambda s: torch.sigmoid(s.chunk(2, -1)[0]) * s.chunk(2, -1)[1]),
     "no activation of the op"),
    "a small slope far out": (Changed(activation=lambda s: halves(s) + 1e-9 * s.chunk(2, -1)[0] ** 3), "no activation"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_what_is_understood_is_read_however_it_is_spelled(name):
    module, why = SPELLED[name]
    found = note(module)
    assert found is None if why is None else why in found


def of_topk(module: Mixture):
    """With ids that a router chooses."""

    def run(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = torch.topk(logits, K)
        return module(x, weights, ids)

    return run


def test_experts_that_all_tokens_go_through_are_understood_where_scores_are_zero():
    args = torch.randn(T, 64), torch.randn(T, E)
    assert note(of_topk(Mixture(Parts(spread, on_input=True))), args) is None
    assert note(of_topk(Mixture(Parts(spread, on_input=True, route=lambda w: w + 0.1))), args) is not None
    assert note(of_topk(Mixture(Parts(spread, on_input=True, route=torch.square))), args) is not None


@pytest.mark.parametrize("form", [batched, einsum])
def test_ids_below_zero_are_what_the_model_takes_them_for(form):
    module, (x, weights, ids) = Mixture(Parts(form)), inputs()
    assert note(module, (x, weights, ids)) is None
    compiled = torch.compile(module, backend="marlin_w4a16", fullgraph=True)
    for given in (ids, ids - E, torch.where(ids == 2, -1, ids)):
        torch.testing.assert_close(compiled(x, weights, given), module(x, weights, given), rtol=1e-4, atol=1e-4)


class Counted(Mixture):
    """Each expert by a factor of its own, after its bias and routing weight."""

    def expert(self, x, weight, chosen, multiply):
        factors = torch.linspace(0.5, 1.5, self.experts)
        return super().expert(x, weight, chosen, multiply) * factors[chosen][:, None]


@pytest.mark.parametrize("form", [grouped, added])
def test_rows_in_the_order_of_sorting_are_no_sum(form, monkeypatch):
    """With one expert a token, all that is made of the second product has the shape of the sum."""
    monkeypatch.setattr(candidates, "_CANDIDATES", 64)
    module, (x, weights, _) = Counted(Parts(form, bias=True, on_input=True), experts=40), inputs(2)
    assert note(module, (x, weights[:, :1].contiguous(), torch.tensor([[9], [3]]))) is not None


def test_ids_that_a_router_chooses_are_not_touched():
    def names(module, args) -> set[str]:
        calls = []
        torch._dynamo.reset()
        torch.compile(module, backend=lambda gm, given: calls.append((gm, given)) or gm.forward)(*args)
        return {getattr(node.target, "__name__", "") for node in rewrite(*calls[0]).graph.graph.nodes}

    module = Mixture(Parts(batched))
    assert "remainder" not in names(of_topk(module), (torch.randn(T, 64), torch.randn(T, E)))
    assert "remainder" in names(module, inputs())


def sums(**more) -> Between:
    at = torch.arange(6).view(2, 3)
    return Between(at=at, compute=lambda z: z, polynomial=(0.0, 1.0), fate=torch.arange(2), **more)


def test_bends_are_found_where_limits_set_in():
    bends, z = Bends(), sums()
    scaled = bends.apply("add", (bends.apply("mul", (z, 1e-3), {}), 0.5), {})
    limited = bends.apply("clamp", (scaled,), {"max": 1.2})
    assert list(bends.points) == pytest.approx([700.0])
    cubed = bends.apply("add", (limited, bends.apply("pow", (limited, 3), {})), {})
    assert cubed.polynomial is not None
    cube = bends.apply("add", (bends.apply("pow", (z, 3), {}), bends.apply("mul", (z, 0.5), {})), {})
    bends.apply("sigmoid", (cube,), {})
    assert sorted(bends.points) == pytest.approx([-0.835122, 0.0, 0.835122, 700.0])
    assert {1e-3, 0.5, 1.2} <= bends.numbers.keys()


@pytest.mark.parametrize(
    "apply",
    [
        lambda b, z: b.apply("sigmoid", (b.apply("sigmoid", (z,), {}),), {}),
        lambda b, z: b.apply("clamp", (b.apply("sub", (b.apply("clamp", (z, -1.0, 1.0), {}), z), {}), -5.0), {}),
        lambda b, z: b.apply("exp", (b.apply("square", (z,), {}),), {}),
        lambda b, z: b.apply("div", (1.0, z), {}), lambda b, z: b.apply("pow", (z, 0.5), {}),
        lambda b, z: b.apply("add", (z, z), {"alpha": 2}), lambda b, z: b.apply("minimum", (z, z), {}),
        lambda b, z: b.apply("add", (z, sums(biased=True)), {}),
    ],
)  # fmt: skip
def test_functions_whose_bends_are_not_known_are_refused(apply):
    with pytest.raises(NotUnderstood, match="what stands between its products"):
        apply(Bends(), sums())
