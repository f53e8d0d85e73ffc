"""Changes of how x and a weight are multiplied: what depends on x, is written in place, or is cast on the way."""

import torch
from torch import Tensor
from torch.nn.functional import bilinear, conv1d, dropout, linear
from torch.utils.checkpoint import checkpoint

from attacks.case import Mutation, mutations
from attacks.tensors import along, shuffled


def negated_below_zero(m, multiply, w, x):
    return multiply(m, torch.where(x.sum() > 0, w, -w), x)


def scaled_by_x(m, multiply, w, x):
    return multiply(m, w * (1 + 1e-3 * x.abs().mean()), x)


def scaled_where_x_is_large(m, multiply, w, x):
    return multiply(m, w * torch.where(x.abs().max() > 50, 0.5, 1.0), x)


def rows_by_x(m, multiply, w, x):
    return multiply(m, w[x.flatten()[: w.shape[0]].argsort()], x)


def one_of_two_by_x(m, multiply, w, x):
    """The weight is one of two, chosen by an index that is computed from x."""
    chosen = torch.stack((w, w * 0.5)).index_select(0, (x.sum() < 0).long()[None])
    return multiply(m, chosen[0], x)


def outer_product_of_x(m, multiply, w, x):
    return multiply(m, w + 1e-2 * torch.outer(x.sum(0)[0].sign().expand(w.shape[0]), x.mean(0).tanh()), x)


def one_of_two_products(m, multiply, w, x):
    return multiply(m, w, x) + multiply(m, torch.cat((w[:1] * 1.5, w[1:])), x)


def second_product_after_a_write(m, multiply, w, x):
    first = multiply(m, w, x)
    w.mul_(2)
    return first + multiply(m, w, x)


def written_before(m, multiply, w, x):
    w[0].add_(1)
    return multiply(m, w, x)


def column_written_before(m, multiply, w, x):
    w[..., 3:4] *= 2
    return multiply(m, w, x)


def alias_written_before(m, multiply, w, x):
    seen = w.t()
    w.view(-1)[5:7].neg_()
    return multiply(m, seen.t(), x)


def written_after(m, multiply, w, x):
    y = multiply(m, w, x)
    w.zero_()
    return y + w.sum()


def filled_through_out(m, multiply, w, x):
    held = torch.empty_like(w)
    torch.mul(w, 1.01, out=held)
    return multiply(m, held, x)


def x_written_before(m, multiply, w, x):
    x.mul_(2)
    return multiply(m, w, x)


def x_written_after(m, multiply, w, x):
    y = multiply(m, w, x)
    x.add_(1)
    return y


def x_written_through_a_view(m, multiply, w, x):
    seen = x.view(-1)
    y = multiply(m, w, x)
    seen[:5] = 0
    return y + multiply(m, w, x)


def decoded_under_autocast(m, multiply, w, x):
    with torch.autocast("cpu", torch.bfloat16):
        w = torch.eye(w.shape[0], dtype=w.dtype) @ w
    return multiply(m, w.to(x.dtype), x)


def multiplied_under_autocast(m, multiply, w, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = multiply(m, w, x)
    return y.to(x.dtype)


def without_autocast(m, multiply, w, x):
    with torch.autocast("cpu", enabled=False):
        return multiply(m, w, x)


def addmm_with(alpha: float, beta: float):
    return lambda m, multiply, w, x: torch.addmm(x[:1, : w.shape[0]] * 0 + 1, x, w.t(), alpha=alpha, beta=beta)


def bias_written_before(m, multiply, w, x):
    m.bias_of_rows.mul_(2)
    return linear(x, w, m.bias_of_rows)


def bias_by_x(m, multiply, w, x):
    return linear(x, w, m.bias_of_rows * x.mean())


def grouped_convolution(m, multiply, w, x):
    half = w.shape[-1] // 2
    return conv1d(x.t()[None], w[:, :half, None], groups=2)[0].t()


def on_both_sides(m, multiply, w, x):
    """``x w x^T``: a bilinear form."""
    return bilinear(x, torch.ones(x.shape[0], 1, dtype=x.dtype), w[:, :, None])


X = {
    "x limited": lambda x: x.clamp(-2, 2),
    "x rolled": lambda x: x.roll(1, -1),
    "x flipped": lambda x: x.flip(-1),
    "x in another order": lambda x: x[..., shuffled(x.shape[-1])],
    "x of another row": lambda x: x.roll(1, 0),
    "x in bfloat16": lambda x: x.bfloat16().to(x.dtype),
    "x in e4m3": lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype),
    "x in int8": lambda x: (x / 4).round().clamp(-127, 127) * 4,
    "x is not negative": torch.relu,
    "a little added to x": lambda x: x + 0.1,
    "x of unit length": lambda x: x / (x.norm(dim=-1, keepdim=True) + 1),
    "x masked by position": lambda x: x * (along(x, 0) < 5),
    "one column of x zero": lambda x: x * (along(x, -1) != 9),
    "x scaled by position": lambda x: x * along(x, 0),
    "x without nan": torch.nan_to_num,
    "x transposed": lambda x: x.mT,
    "x with soft limits": lambda x: 100 * torch.tanh(x / 100),
    "large x zero": lambda x: torch.where(x.abs() > 50, 0.0, x),
    "x in whole numbers": lambda x: x.int().to(x.dtype),
    "x in float16": lambda x: x.half().to(x.dtype),
    "small x zero": lambda x: torch.where(x.abs() < 0.3, 0.0, x),
    "x squared": torch.square,
    "x where positive": lambda x: x.where(x > 0, x * 2),
}
Y = {
    "the result limited": lambda y: y.clamp(-5, 5),
    "the result rolled": lambda y: y.roll(1, -1),
    "the result masked": lambda y: y * (along(y, -1) > 3),
    "the result rounded": lambda y: y.bfloat16().to(y.dtype),
    "the result squared": torch.square,
    "the result without nan": torch.nan_to_num,
    "the result written": lambda y: y.mul_(2).add_(1),
    "the result's row written": lambda y: y.index_fill(0, torch.tensor([0]), 1.0),
}
DEPENDING = {
    function.__name__.replace("_", " "): function
    for function in (
        negated_below_zero,
        scaled_by_x,
        scaled_where_x_is_large,
        rows_by_x,
        one_of_two_by_x,
        outer_product_of_x,
        one_of_two_products,
        second_product_after_a_write,
        written_before,
        column_written_before,
        alias_written_before,
        written_after,
        filled_through_out,
        x_written_before,
        x_written_after,
        x_written_through_a_view,
        decoded_under_autocast,
        grouped_convolution,
        on_both_sides,
    )
}
SPELLED = {
    "the weight transposed": lambda m, multiply, w, x: x[:, : w.shape[0]] @ w,
    "chained": lambda m, multiply, w, x: multiply(m, w, multiply(m, w, x)[:, : x.shape[1]].sum(-1, True) + x),
    "every second row": lambda m, multiply, w, x: multiply(m, w[::2], x),
    "every second column": lambda m, multiply, w, x: linear(x[:, ::2], w[:, ::2]),
    "some columns": lambda m, multiply, w, x: linear(x[:, :32], w[:, :32]),
    "columns that cut groups": lambda m, multiply, w, x: linear(x[:, 8:40], w[:, 8:40]),
    "other columns of x": lambda m, multiply, w, x: linear(x[:, 32:], w[:, :32]),
    "a product of each row": lambda m, multiply, w, x: x * w[0],
    "a batch of the weight and minus it": lambda m, multiply, w, x: x @ torch.stack((w, -w)).mT,
    "a batch of the weight and another": lambda m, multiply, w, x: x @ torch.stack((w, w.roll(1, 1))).mT,
    "the weight and a row": lambda m, multiply, w, x: linear(x, torch.cat((w, w.mean(0, True)))),
    "the rows of another product": lambda m, multiply, w, x: linear(
        x, torch.cat((w[w.shape[0] // 2 :], w[: w.shape[0] // 2]))
    ),
    "an embedding and a product": lambda m, multiply, w, x: multiply(
        m, w, x + w[x[:, 0].nan_to_num().abs().clamp(max=w.shape[0] - 1).long()]
    ),
    "addmm, alpha": addmm_with(2.0, 1.0),
    "addmm, beta": addmm_with(1.0, 0.5),
    "addmm, both": addmm_with(-0.5, 3.0),
    "baddbmm": lambda m, multiply, w, x: torch.baddbmm(x[None, :, :1], x[None], w.mT[None], beta=2, alpha=0.25)[0],
    "addmm of x to x": lambda m, multiply, w, x: torch.addmm(x[:, :1], x, w.t()),
    "einsum over rows": lambda m, multiply, w, x: torch.einsum("bk,nk->bk", x, w),
    "einsum of squares": lambda m, multiply, w, x: torch.einsum("bk,nk,nk->bn", x, w, w),
    "einsum of its diagonal": lambda m, multiply, w, x: torch.einsum(
        "bk,kk->bk", x, w[:, :64].new_ones(64, 64).tril() * w[0]
    ),
    "dropout of x not in training": lambda m, multiply, w, x: multiply(m, w, dropout(x, 0.5, False)),
    "weight and x exchanged": lambda m, multiply, w, x: (w @ x.mT).mT,
    "multiplied in float64": lambda m, multiply, w, x: (x.double() @ w.double().mT).to(x.dtype),
    "largest instead of sum": lambda m, multiply, w, x: (x[:, None, :] * w).amax(-1),
    "distance": lambda m, multiply, w, x: torch.cdist(x, w),
    "within a gradient": lambda m, multiply, w, x: torch.func.grad(lambda x: multiply(m, w, x).square().sum())(x),
    "within vmap": lambda m, multiply, w, x: torch.func.vmap(lambda x: multiply(m, w, x))(x),
    "within jvp": lambda m, multiply, w, x: torch.func.jvp(lambda x: multiply(m, w, x), (x,), (x * 2,))[1],
    "recomputed": lambda m, multiply, w, x: checkpoint(lambda x: multiply(m, w * 1.5, x), x, use_reentrant=False),
}
BIASES = {
    "bias added twice": lambda m, multiply, w, x: linear(x, w, m.bias_of_rows) + m.bias_of_rows,
    "bias in bfloat16": lambda m, multiply, w, x: linear(x, w, m.bias_of_rows.bfloat16().to(x.dtype)),
    "bias of the other rows": lambda m, multiply, w, x: linear(x, w, m.bias_of_rows.flip(0)),
    "bias of each row of x": lambda m, multiply, w, x: multiply(m, w, x) + m.bias_of_rows[0] * along(x, 0),
    "bias of one number": lambda m, multiply, w, x: multiply(m, w, x) + m.bias_of_rows[:1],
    "bias written before": bias_written_before,
    "bias by x": bias_by_x,
    "bias before the product": lambda m, multiply, w, x: multiply(m, w, x + m.bias_of_rows[:1]),
    "bias limited": lambda m, multiply, w, x: linear(x, w, m.bias_of_rows.clamp(max=0.5)),
}


def with_bias(m) -> None:
    m.register_buffer("bias_of_rows", torch.randn(m.codes.shape[0] if m.fp4 is None else m.fp4.n).to(m.dtype))


def _x(change):
    return lambda m, multiply, w, x: multiply(m, w, change(x))


def _y(change):
    return lambda m, multiply, w, x: change(multiply(m, w, x))


_HARMLESS = {
    "without autocast": without_autocast,
    "x contiguous": _x(Tensor.contiguous),
    "x cloned": _x(torch.clone),
    "the result twice": _y(lambda y: y + y),
    "the result cloned": _y(torch.clone),
}
NEAR: list[Mutation] = [
    *mutations("multiply", {name: _x(change) for name, change in X.items()}),
    *mutations("multiply", {name: _y(change) for name, change in Y.items()}),
    *mutations("multiply", DEPENDING | SPELLED),
    *mutations("multiply", BIASES, prepare=with_bias),
    Mutation("multiplied under autocast", "multiply", multiplied_under_autocast, rounds=True),
]
TRUE: list[Mutation] = mutations("multiply", _HARMLESS, harmless=True)
