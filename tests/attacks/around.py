"""Changes of what stands around a mixture: writes on the way, gradients, numbers of tokens, where its sum goes."""

import torch
from torch import Tensor

from attacks.case import Mutation, mutations, of_value
from attacks.experts import At
from attacks.tensors import along


def _written(of: str, by):
    """Something of the pairs is written to once the value is there."""

    def change(m, value: Tensor, at: At) -> Tensor:
        by(getattr(at, of))
        return value

    return change


def _twice(t: Tensor) -> None:
    t.mul_(2)


def _turned(t: Tensor) -> None:
    t.copy_(t.roll(1, 0))


WRITTEN = {"weight": _twice, "rows": _twice, "expert": _turned}
# What is computed stays, its gradient does not.
GRADIENTS = {
    "without gradients": lambda t: t.detach(),
    "with twice the gradients": lambda t: 2 * t - t.detach(),
    "with gradients of some columns": lambda t: torch.where(along(t, -1) % 2 == 0, t, t.detach()),
    "with gradients of some rows": lambda t: torch.cat((t[:1].detach(), t[1:])),
}
COUNTS = {
    "scaled by their number": lambda t: t * (1 + len(t) / 100),
    "twice from 17 rows on": lambda t: t * 2 if len(t) > 16 else t,
    "twice where rows are even": lambda t: t * 2 if len(t) % 2 == 0 else t,
    "twice in the first half": lambda t: torch.cat((t[: len(t) // 2] * 2, t[len(t) // 2 :])),
    "twice in the last row": lambda t: torch.cat((t[:-1], t[-1:] * 2)),
}
PLACES = ("tokens", "rows", "between", "down", "pairs", "out")


def _no_grad(t: Tensor) -> Tensor:
    with torch.no_grad():
        return t.clone()


def _in_bfloat16(y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.einsum("teh,e->th", y, torch.ones(y.shape[1], dtype=y.dtype)).to(y.dtype)


def _not_in_bfloat16(y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y.sum(1)


def _in_a_part(y: Tensor) -> Tensor:
    larger = y.new_ones(len(y), 2, y.shape[-1])
    larger[:, 0] = y.sum(1)
    return larger.sum(1)


def _in_a_view(y: Tensor) -> Tensor:
    larger = y.new_zeros(len(y), 2 * y.shape[-1])
    larger[:, : y.shape[-1]] = y.sum(1)
    return larger[:, : y.shape[-1]]


def _beside(y: Tensor) -> Tensor:
    larger = y.new_zeros(len(y) + 1, y.shape[-1])
    larger[1:].add_(y.sum(1))
    return larger[:-1]


TOTALS = {
    "products under autocast": _in_bfloat16,
    "added to ones": lambda y: torch.ones_like(y[:, 0]).add_(y.sum(1)),
    "of a part and ones": _in_a_part,
    "of the row before": _beside,
    "transposed": lambda y: torch.einsum("tkh->ht", y).reshape(y[:, 0].shape),
    "twice by a write": lambda y: y.mul_(2).sum(1),
    "after a choice is written": lambda y: (y.select(1, 0).zero_(), y.sum(1))[1],
}
GOOD_TOTALS = {
    "under autocast": _not_in_bfloat16,
    "in a view": _in_a_view,
    "with other strides": lambda y: y.sum(1).t().contiguous().t(),
    "transposed twice": lambda y: torch.einsum("tkh->ht", y).t(),
}


def tokens_written(m, out: Tensor, x: Tensor) -> Tensor:
    x.mul_(2)
    return out


NEAR: list[Mutation] = [
    *(
        Mutation(f"{of} written, {place}", place, _written(of, by))
        for of, by in WRITTEN.items()
        for place in ("route", "ids", "weight", "sums", "between", "down")
    ),
    *(
        Mutation(f"{name}, {place}", place, of_value(change), needs="gradients")
        for name, change in {**GRADIENTS, "under no_grad": _no_grad}.items()
        for place in (*PLACES, "route", "weight")
    ),
    *(Mutation(f"{name}, {place}", place, of_value(change)) for name, change in COUNTS.items() for place in PLACES),
    *(
        Mutation(f"weights: {name}, {place}", place, of_value(change))
        for name, change in COUNTS.items()
        for place in ("route", "weight")
    ),
    *mutations("total", {f"sum: {name}": of_value(change) for name, change in TOTALS.items()}),
    Mutation("tokens written at last", "out", tokens_written),
]
TRUE: list[Mutation] = [
    *mutations("total", {f"sum: {name}": of_value(change) for name, change in GOOD_TOTALS.items()}, harmless=True),
]
