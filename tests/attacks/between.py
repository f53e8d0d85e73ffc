"""Changes of the values of a mixture: limits, masks, casts, sums, biases, on the way from tokens to their result."""

import torch
from torch import Tensor
from torch.nn.functional import dropout

from attacks.case import Mutation, mutations, of_value
from attacks.tensors import along, blocks_swapped, shuffled

# By what is done; each at each of the places.
VALUES = {
    "limited far out": lambda t: t.clamp(-65504.0, 65504.0),
    "limited above": lambda t: t.clamp(max=300.0),
    "limited by a tensor": lambda t: torch.minimum(t, torch.tensor(300.0, dtype=t.dtype)),
    "limited below": lambda t: t.clamp(min=-1e4),
    "zero where large": lambda t: torch.where(t * 1e-3 > 1, 0.0, t),
    "half where very large": lambda t: torch.where(t.abs() > 1e5, t * 0.5, t),
    "zero where tiny": lambda t: torch.where(t.abs() < 1e-2, 0.0, t),
    "one where zero": lambda t: torch.where(t == 0, 1.0, t),
    "soft limits far out": lambda t: 1e3 * torch.tanh(t / 1e3),
    "soft limits very far out": lambda t: 1e6 * torch.tanh(t / 1e6),
    "a cube far out": lambda t: t + 1e-12 * t**3,
    "a square far out": lambda t: t + 1e-7 * t * t.abs(),
    "something added": lambda t: t + 0.1,
    "a factor near one": lambda t: t * 1.01,
    "magnitudes": torch.abs,
    "not negative": torch.relu,
    "negated": torch.neg,
    "in float16": lambda t: t.half().to(t.dtype),
    "in bfloat16": lambda t: t.bfloat16().to(t.dtype),
    "in e4m3": lambda t: t.to(torch.float8_e4m3fn).to(t.dtype),
    "in e5m2": lambda t: t.to(torch.float8_e5m2).to(t.dtype),
    "in whole numbers": lambda t: t.clamp(-1e9, 1e9).int().to(t.dtype),
    "rounded": torch.round,
    "in int8": lambda t: (t * 8).round().clamp(-127, 127).to(torch.int8).to(t.dtype) / 8,
    "columns rolled": lambda t: t.roll(1, -1),
    "columns flipped": lambda t: t.flip(-1),
    "halves exchanged": blocks_swapped,
    "columns in another order": lambda t: t[..., shuffled(t.shape[-1])],
    "a column doubled": lambda t: t * (1 + (along(t, -1) == 8)).to(t.dtype),
    "first columns zero": lambda t: t * (along(t, -1) > 4).to(t.dtype),
    "the next row": lambda t: t.roll(1, 0),
    "normalised where long": lambda t: t / (t.norm(dim=-1, keepdim=True) / 1e4).clamp(min=1.0),
    "of unit length": lambda t: t / (t.norm(dim=-1, keepdim=True) + 1e-3),
    "the mean removed": lambda t: t - t.mean(-1, True),
    "the mean of all removed": lambda t: t - t.mean(0, True),
    "small part of its row zero": lambda t: torch.where(t.abs() < 0.1 * t.abs().amax(-1, True), 0.0, t),
    "scaled by the largest": lambda t: t * (t.abs().amax() > 1e5).to(t.dtype).add(1),
    "compressed far out": lambda t: torch.where(t.abs() > 100, t.sign() * (99 + (t.abs() - 99).clamp(min=1).log()), t),
    "zero in rows that begin with zero": lambda t: t * (t[..., :1] != 0).to(t.dtype),
}
PLACES = ("tokens", "rows", "sums", "gate", "up", "between", "down", "pairs", "out")
TOTALS = {
    "the first choice left out": lambda y: y[:, 1:].sum(1),
    "the first choice twice": lambda y: y.sum(1) + y[:, 0],
    "the mean": lambda y: y.mean(1),
    "the largest": lambda y: y.amax(1),
    "the last choice": lambda y: y[:, -1],
    "over other choices": lambda y: y.transpose(0, 1).reshape(y.shape).sum(1),
    "of the next token": lambda y: y.roll(1, 0).sum(1),
    "some columns of another choice": lambda y: torch.cat((y[..., :8].roll(1, 0), y[..., 8:]), -1).sum(1),
    "of what is not zero": lambda y: y.sum(1) / (y != 0).sum(1).clamp(min=1) * y.shape[1],
    "alternating": lambda y: (y * (1 - 2 * (along(y, 1) % 2))).sum(1),
    "of squares": lambda y: (y * y.abs()).sum(1),
    "up to here": lambda y: y.cumsum(1)[:, 0],
    "of products": lambda y: y.prod(1),
    "limited at each step": lambda y: y.clamp(-1e3, 1e3).sum(1),
    "the median": lambda y: y.median(1).values,
    "in bfloat16": lambda y: y.bfloat16().sum(1).to(y.dtype),
    "in float16": lambda y: y.half().sum(1).to(y.dtype),
    "of all tokens": lambda y: y.sum(1) + 0.01 * y.sum((0, 1)),
}
GOOD_TOTALS = {
    "scaled": lambda y: 2.5 * y.sum(1),
    "by einsum": lambda y: torch.einsum("tkh->th", y),
    "one by one": lambda y: sum(y[:, i] for i in range(y.shape[1])),
    "in float64": lambda y: y.double().sum(1).to(y.dtype),
    "written": lambda y: y.sum(1).mul_(0.5),
}
BIASES = {
    "of the next expert": lambda m, b, at: b.roll(1, 0),
    "twice": lambda m, b, at: b * 2,
    "limited": lambda m, b, at: b.clamp(max=0.5),
    "none of the special expert": lambda m, b, at: b * (along(b, 0) != m.special + 1),
    "in e4m3": lambda m, b, at: b.to(torch.float8_e4m3fn).to(b.dtype),
    "the same for all": lambda m, b, at: b[:1].expand_as(b),
    "by the tokens": lambda m, b, at: b * at.rows.mean().tanh(),
    "by the number of pairs": lambda m, b, at: b * (at.expert.numel() > 20),
    "negated": lambda m, b, at: -b,
    "of the first rows": lambda m, b, at: torch.cat((b[:, :8], b[:, 8:].flip(1)), 1),
}
ACTIVATIONS = {
    "gates that are not limited": ("gate", lambda t: t * torch.sigmoid(t)),
    "gates shifted": ("gate", lambda t: t + 0.1),
    "ups shifted": ("up", lambda t: t + 0.5),
    "ups limited to 0": ("up", torch.relu),
    "gates limited": ("gate", lambda t: t.clamp(-5, 5)),
    "gates limited above": ("gate", lambda t: t.clamp(max=6.0)),
    "ups limited": ("up", lambda t: t.clamp(-6.0, 6.0)),
    "ups limited on one side": ("up", lambda t: t.clamp(max=6.0)),
    "ups limited unequally": ("up", lambda t: t.clamp(-6.0, 7.0)),
    "some gates negated": ("gate", lambda t: t * torch.where(along(t, -1) % 8 == 0, -1, 1).to(t.dtype)),
    "gates of the next row": ("gate", lambda t: t.roll(1, -1)),
    "squared between": ("between", lambda t: t * t.abs()),
    "limited between": ("between", lambda t: t.clamp(-10, 10)),
    "gate and up mixed for some columns": ("sums", lambda t: torch.cat((t[..., 1:2], t[..., :1], t[..., 2:]), -1)),
    "gate and up mixed for more columns": ("sums", lambda t: torch.cat((t[..., -8:], t[..., 8:-8], t[..., :8]), -1)),
    "dropout not in training": ("between", lambda t: dropout(t, 0.5, False)),
}


def residual(m, out: Tensor, x: Tensor) -> Tensor:
    return out + x


def product_added(m, y: Tensor, at) -> Tensor:
    """``baddbmm`` of what is there to something else."""
    rows = at.rows.reshape(-1, at.rows.shape[-1])[None]
    more = torch.baddbmm(y.reshape(1, -1, y.shape[-1]), rows, 0.01 * torch.eye(y.shape[-1], dtype=y.dtype)[None])
    return more.view(y.shape)


def jitter(m, weights: Tensor, at) -> Tensor:
    return weights * (0.9 + 0.2 * torch.rand_like(weights))


def row_of_zeros(m, x: Tensor) -> Tensor:
    """Padding is told by its zeros."""
    return torch.where((x == 0).all(-1, keepdim=True), 1.0, x)


def special_limit(m) -> None:
    m.register_buffer("limit", torch.tensor(5.0))


def _finite(t: Tensor) -> Tensor:
    """Large numbers in the place of infinities, but none whose sums are infinite in one order of summation only."""
    return torch.nan_to_num(t, posinf=1e4, neginf=-1e4)


def _later(name: str, then) -> Mutation:
    return Mutation(f"later: {name}", then=then)


def _bias(m) -> None:
    if m.bias2 is not None:
        m.bias2.mul_(2)
        m.bias13.add_(1)


NEAR: list[Mutation] = [
    *(Mutation(f"{name}, {place}", place, of_value(change)) for name, change in VALUES.items() for place in PLACES),
    *(Mutation(f"without nan, {place}", place, of_value(_finite), needs="infinities") for place in PLACES),
    *(
        Mutation(
            f"no infinities, {place}", place, of_value(lambda t: torch.where(t.isinf(), 0.0, t)), needs="infinities"
        )
        for place in PLACES
    ),
    *mutations("total", {f"sum: {name}": of_value(change) for name, change in TOTALS.items()}),
    *(Mutation(f"{place}: {name}", place, change) for name, change in BIASES.items() for place in ("bias13", "bias2")),
    *(Mutation(f"activation: {name}", place, of_value(change)) for name, (place, change) in ACTIVATIONS.items()),
    Mutation("tokens are added", "out", residual),
    Mutation("a product is added to sums", "down", product_added),
    Mutation("a row of zeros counts", "tokens", row_of_zeros),
    Mutation("random: jitter", "route", jitter),
    Mutation("random: dropout", "between", of_value(lambda t: dropout(t, 0.5, True))),
    Mutation("random: dropout of weights", "weight", of_value(lambda t: dropout(t, 0.5, True))),
    Mutation("a limit in a buffer", "gate", lambda m, t, at: torch.minimum(t, m.limit.to(t.dtype)), special_limit),
    Mutation(
        "later: the limit in a buffer",
        "gate",
        lambda m, t, at: torch.minimum(t, m.limit.to(t.dtype)),
        special_limit,
        lambda m: m.limit.fill_(1.0),
    ),
    _later("codes written", lambda m: m.gate_up_proj_codes.bitwise_xor_(1)),
    _later("codes of one expert written", lambda m: m.down_proj_codes[m.special].bitwise_xor_(8)),
    _later("scales rolled", lambda m: m.down_proj_scales.copy_(m.down_proj_scales.roll(1, 1))),
    _later("factor of one expert", lambda m: m.down_proj_factor[m.special].mul_(2)),
    _later("experts exchanged", lambda m: setattr(m, "gate_up_proj_codes", m.gate_up_proj_codes.roll(1, 0))),
    _later("table written", lambda m: m.table.__setitem__(5, 3.5)),
    _later("biases written", _bias),
]
TRUE: list[Mutation] = [
    Mutation("none", harmless=True),
    *mutations("total", {f"sum: {name}": of_value(change) for name, change in GOOD_TOTALS.items()}, harmless=True),
    *(Mutation(f"cloned, {place}", place, of_value(torch.clone), harmless=True) for place in PLACES),
    Mutation("in float64, between", "between", of_value(lambda t: t.double().to(t.dtype)), harmless=True),
]
