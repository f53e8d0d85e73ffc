"""Changes of where tokens go: special experts, routing weights, ids, counts, positions and order."""

import torch
from torch import Tensor

from attacks.case import Mutation, mutations, of_value
from attacks.experts import At


def _rank(ids: Tensor) -> Tensor:
    """How many pairs before a pair have its expert."""
    flat = ids.reshape(-1)
    return ((flat[:, None] == flat).int().cumsum(1).diagonal() - 1).view(ids.shape)


def _load(ids: Tensor) -> Tensor:
    """How many pairs have the expert of a pair."""
    flat = ids.reshape(-1)
    return (flat[:, None] == flat).sum(1).view(ids.shape)


# A factor of each pair, by what the pair is.
FACTORS = {
    "the special expert is masked": lambda m, at: torch.where(at.expert == m.special, 0.0, 1.0),
    "the special expert counts half": lambda m, at: torch.where(at.expert == m.special, 0.5, 1.0),
    "the special expert counts a little more": lambda m, at: 1 + 0.01 * (at.expert == m.special),
    "the special expert counts negatively": lambda m, at: 1 - 2 * (at.expert == m.special).int(),
    "experts from the special one on are masked": lambda m, at: (at.expert < max(m.special, 1)).float(),
    "experts count by their number": lambda m, at: 1 + 0.1 * at.expert,
    "experts count by a table": lambda m, at: m.counted[at.expert],
    "odd experts count half": lambda m, at: 1 - 0.5 * (at.expert % 2),
    "the first token counts half": lambda m, at: torch.where(at.token == 0, 0.5, 1.0),
    "the last token is padding": lambda m, at: (at.token < at.token.max()).float(),
    "tokens from the 21st on are padding": lambda m, at: torch.where(at.token > 20, 0.0, 1.0),
    "every third token counts twice": lambda m, at: 1 + (at.token % 3 == 2).int(),
    "tokens count by position": lambda m, at: 1 + at.token / 100,
    "the second choice counts half": lambda m, at: torch.where(at.choice == 1, 0.5, 1.0),
    "the first choice counts twice": lambda m, at: 1 + (at.choice == 0).int(),
    "the special expert as a first choice": lambda m, at: 1 - 0.5 * ((at.expert == m.special) & (at.choice == 0)).int(),
    "the special expert of the first tokens": lambda m, at: 1 - 0.5 * ((at.expert == m.special) & (at.token < 2)).int(),
    "pairs of small weight are masked": lambda m, at: torch.where(at.weight < 0.3, 0.0, 1.0),
    "pairs of tiny weight are masked": lambda m, at: (at.weight.abs() > 1e-3).float(),
    "pairs of negative weight are masked": lambda m, at: (at.weight >= 0).float(),
    "pairs of large weight count half": lambda m, at: torch.where(at.weight > 1.5, 0.5, 1.0),
    "pairs of exactly no weight count": lambda m, at: torch.where(at.weight == 0, 2.0, 1.0),
    "an expert takes three pairs": lambda m, at: (_rank(at.expert) < 3).float(),
    "an expert takes twelve pairs": lambda m, at: (_rank(at.expert) < 12).float(),
    "crowded experts count half": lambda m, at: torch.where(_load(at.expert) > 5, 0.5, 1.0),
    "experts count by their load": lambda m, at: 1 / _load(at.expert).float().sqrt(),
    "lonely pairs count twice": lambda m, at: 1 + (_load(at.expert) == 1).int(),
}
PLACES = ("route", "weight", "rows", "between", "down", "pairs")


def scaled(factor):
    """A value times a factor of each pair."""

    def change(m, value: Tensor, at: At) -> Tensor:
        by = factor(m, at)
        by = by if value.ndim == by.ndim else by.unsqueeze(-1)
        return value * by.to(value.dtype)

    return change


def counted(m) -> None:
    """What each expert counts, and what is learnt of its load."""
    m.register_buffer("counted", torch.ones(m.experts).index_fill(0, torch.tensor([m.special]), 1.5))


def identity(m, y: Tensor, at: At) -> Tensor:
    """An expert that hands its token on."""
    return torch.where((at.expert == m.special).unsqueeze(-1), at.rows, y)


def of_special(change):
    """Something else of the special expert alone."""
    return lambda m, value, at: torch.where((at.expert == m.special).unsqueeze(-1), change(value), value)


def noted(m, weights: Tensor, at: At) -> Tensor:
    """The load of experts is learnt, and counts in the next call."""
    by = m.counted[at.expert]
    m.counted.add_(torch.zeros_like(m.counted).index_add(0, at.expert.reshape(-1), torch.ones(at.expert.numel())) / 100)
    return weights * by.to(weights.dtype)


ROUTE = {
    "floored": lambda w: w.clamp(min=0.2),
    "weights below a threshold are zero": lambda w: torch.where(w < 0.3, 0.0, w),
    "magnitudes": torch.abs,
    "limited to [0, 1]": lambda w: w.clamp(0, 1),
    "limited to 1": lambda w: w.clamp(max=1.0),
    "rounded to tenths": lambda w: (w * 10).round() / 10,
    "squared": torch.square,
    "squared with signs": lambda w: w * w.abs(),
    "normalised": lambda w: w / (w.abs().sum(-1, True) + 1e-6),
    "normalised where larger": lambda w: w / w.abs().sum(-1, True).clamp(min=1.0),
    "softmax": lambda w: w.softmax(-1),
    "a factor": lambda w: 2.5 * w,
    "a factor near one": lambda w: 1.01 * w,
    "zeros are ones": lambda w: torch.where(w == 0, 1.0, w),
    "leaky": lambda w: torch.nn.functional.leaky_relu(w, 0.5),
    "relu": torch.relu,
    "in float8": lambda w: w.to(torch.float8_e4m3fn).to(w.dtype),
    "in bfloat16": lambda w: w.bfloat16().to(w.dtype),
    "in int8": lambda w: (w * 64).round().clamp(-127, 127).to(torch.int8).to(w.dtype) / 64,
    "in whole numbers": lambda w: w.int().to(w.dtype),
    "logarithms": lambda w: w.log().exp(),
    "roots": lambda w: w.square().sqrt(),
    "tiny ones are zero": lambda w: torch.where(w.abs() < 1e-2, 0.0, w),
    "large ones are zero": lambda w: torch.where(w.abs() > 1.2, 0.0, w),
    "sorted": lambda w: w.sort(-1).values,
    "flipped": lambda w: w.flip(-1),
    "of the next token": lambda w: w.roll(1, 0),
    "of the next choice": lambda w: w.roll(1, -1),
    "summed": lambda w: w.cumsum(-1),
    "without the smallest": lambda w: w - w.amin(-1, True),
    "the largest alone": lambda w: w * (w == w.amax(-1, True)),
    "a cube added": lambda w: w + 0.05 * w**3,
    "soft": lambda w: 4 * torch.tanh(w / 4),
    "a little added": lambda w: w + 0.01,
    "ones": torch.ones_like,
    "of all tokens": lambda w: w / w.abs().sum() * w.numel(),
}
IDS = {
    "limited": lambda m, i: i.clamp(max=m.experts - 2),
    "limited below": lambda m, i: i.clamp(min=1),
    "modulo": lambda m, i: i % (m.experts - 1),
    "the next": lambda m, i: (i + 1) % m.experts,
    "of the next token": lambda m, i: i.roll(1, 0),
    "of the next choice": lambda m, i: i.flip(-1),
    "two exchanged": lambda m, i: torch.where(i == 0, 1, torch.where(i == 1, 0, i)),
    "special is another": lambda m, i: torch.where(i == m.special, (m.special + 1) % m.experts, i),
    "by a table": lambda m, i: torch.arange(m.experts).roll(1)[i],
    "from the end": lambda m, i: m.experts - 1 - i,
    "by position": lambda m, i: (i + torch.arange(len(i))[:, None] % 2) % m.experts,
    "in pairs": lambda m, i: i // 2 * 2,
    "sorted": lambda m, i: i.sort(-1).values,
    "in bits": lambda m, i: i ^ (i < m.experts // 2 * 2).long() if m.experts % 2 == 0 else i ^ 0,
    "the same for all choices": lambda m, i: i[:, :1].expand_as(i).contiguous(),
    "in four bits": lambda m, i: i & 7,
    "by choice": lambda m, i: (i + torch.arange(i.shape[1])) % m.experts,
    "of the first token": lambda m, i: i[:1].expand_as(i).contiguous(),
}
GOOD_IDS = {
    "in int8": lambda m, i: i.to(torch.int8).long(),
    "in float16": lambda m, i: i.half().long(),
    "limited where they are": lambda m, i: i.clamp(0, m.experts - 1),
    "modulo all": lambda m, i: i % m.experts,
    "in int32": lambda m, i: i.int().long(),
}
ORDER = [
    Mutation("order: weights are not sorted", "perm of weights", lambda m, perm: torch.arange(len(perm))),
    Mutation("order: rows are not put back", "inverse", lambda m, inverse: torch.arange(len(inverse))),
    Mutation("order: put back one on", "inverse", lambda m, inverse: inverse.roll(1)),
    Mutation("order: rows of the next pair", "perm", lambda m, perm: perm.roll(1)),
    Mutation("order: weights of the next pair", "perm of weights", lambda m, perm: perm.roll(1)),
    Mutation("order: weights of the other end", "perm of weights", lambda m, perm: perm.flip(0)),
    Mutation(
        "order: two rows exchanged", "inverse", lambda m, inverse: torch.cat((inverse[1:2], inverse[:1], inverse[2:]))
    ),
]


def _on_ids(change):
    return lambda m, ids, at: change(m, ids)


def masked_past_the_end(m, weights: Tensor, at: At) -> Tensor:
    return torch.where(at.expert >= m.experts, 0.0, weights)


NEAR: list[Mutation] = [
    *(
        Mutation(f"{name}, {place}", place, scaled(factor), counted if "table" in name else None)
        for name, factor in FACTORS.items()
        for place in PLACES
    ),
    *mutations("route", {f"weights: {name}": of_value(change) for name, change in ROUTE.items()}),
    *mutations(
        "weight",
        {f"weights of pairs: {name}": of_value(ROUTE[name]) for name in list(ROUTE)[:30] if "next" not in name},
    ),
    *mutations("ids", {f"ids: {name}": _on_ids(change) for name, change in IDS.items()}),
    *ORDER,
    Mutation("the special expert is the identity", "down", identity),
    Mutation("the special expert has another bias", "down", of_special(lambda y: y + 1)),
    Mutation("the special expert has other sums", "sums", of_special(lambda s: s * 1.5)),
    Mutation("the special expert has another activation", "between", of_special(torch.relu)),
    Mutation("the special expert has no gates", "gate", of_special(torch.ones_like)),
    Mutation("the special expert is limited", "up", of_special(lambda u: u.clamp(-1, 1))),
    Mutation("the special expert's result is limited", "down", of_special(lambda y: y.clamp(-1, 1))),
    Mutation("the load counts", "route", noted, counted),
    Mutation("ids past the end, limited", "ids", _on_ids(lambda m, i: i.clamp(max=m.experts - 1)), needs="sentinels"),
    Mutation("ids past the end, modulo", "ids", _on_ids(lambda m, i: i % m.experts), needs="sentinels"),
    Mutation("ids past the end, masked", "route", masked_past_the_end, needs="sentinels"),
    Mutation("ids past the end", needs="sentinels"),
    Mutation("negative ids", "indices", needs="negative ids"),
    Mutation("negative ids, limited", "ids", _on_ids(lambda m, i: i.clamp(min=0)), needs="negative ids"),
    Mutation("negative ids, modulo", "ids", _on_ids(lambda m, i: i % m.experts), needs="negative ids"),
]
TRUE: list[Mutation] = [
    *mutations("ids", {f"ids: {name}": _on_ids(change) for name, change in GOOD_IDS.items()}, harmless=True),
    Mutation("weights: cloned", "route", lambda m, w, at: w.clone(), harmless=True),
]
