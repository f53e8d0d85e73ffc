"""What a weight depends on beside its leaves: hidden state, hidden randomness, and what happens between calls."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.case import Mutation, mutations


@torch.library.custom_op("marlin_w4a16_attacks::double_", mutates_args=("t",))
def double(t: Tensor) -> None:
    """An operator of somebody else that writes to what it is given."""
    t.mul_(2)


def _ones(m, *names: str) -> None:
    for name in names:
        m.register_buffer(name, torch.ones(1))


def number(m) -> None:
    """A number of the model that is written to."""
    _ones(m, "hidden")


def batch_norm(m) -> None:
    m.norm = nn.BatchNorm1d(m.fp4.k).to(m.dtype)


def embedding(m) -> None:
    m.held = nn.Embedding(2, 4, max_norm=0.25)
    m.held.weight.data.fill_(0.9)
    m.held.weight.requires_grad_(False)


def alias(m) -> None:
    """The codes become a part of a bigger tensor, which the model holds too."""
    base = torch.zeros(m.codes.numel() + 8, dtype=m.codes.dtype)
    base[4:-4] = m.codes.flatten()
    m.register_buffer("base", base)
    m.codes = base[4:-4].view(m.codes.shape)


def after_batch_norm(which: str):
    def multiply(m, inner, w, x):
        y = m.norm(x)
        return inner(m, w * (0.5 + getattr(m.norm, which)[:1]), x) + 0 * y.sum()

    return multiply


def after_functional_batch_norm(m, inner, w, x):
    F.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True)
    return inner(m, w * (0.5 + m.norm.running_var[:1]), x)


def after_instance_norm(m, inner, w, x):
    F.instance_norm(x[None].expand(2, -1, -1).mT, m.norm.running_mean, m.norm.running_var, use_input_stats=True)
    return inner(m, w * (0.5 + m.norm.running_var[:1]), x)


def after_embedding(m, inner, w, x):
    y = m.held(torch.zeros(2, dtype=torch.long)).sum() * 0
    return inner(m, w * m.held.weight[0, :1], x) + y


def after_embedding_bag(m, inner, w, x):
    y = F.embedding_bag(torch.zeros(1, 2, dtype=torch.long), m.held.weight, max_norm=0.25).sum() * 0
    return inner(m, w * m.held.weight[0, :1], x) + y


def then_written(write):
    """The number is written to before it is read."""

    def multiply(m, inner, w, x):
        write(m, x)
        return inner(m, w * m.hidden.to(w.dtype), x)

    return multiply


def then_write(write):
    """What the weight is made from is written to after the product."""

    def multiply(m, inner, w, x):
        y = inner(m, w, x)
        write(m, x)
        return y

    return multiply


def sorted_into(m, x) -> None:
    torch.sort(m.hidden * 1.5, out=(m.hidden, torch.empty(1, dtype=torch.long)))


def assigned(m, x) -> None:
    m.hidden = m.hidden * 1.5


def set_to(m, x) -> None:
    m.hidden.data = m.hidden * 1.5


WRITES = {
    "counted": lambda m, x: m.hidden.add_(1),
    "multiplied": lambda m, x: m.hidden.mul_(1.5),
    "by operator": lambda m, x: m.hidden.__imul__(1.5),
    "by aten": lambda m, x: torch.ops.aten.mul_.Tensor(m.hidden, torch.tensor(1.5)),
    "by aten copy": lambda m, x: torch.ops.aten.copy_.default(m.hidden, m.hidden * 1.5),
    "by foreach": lambda m, x: torch._foreach_mul_([m.hidden], 1.5),
    "by foreach copy": lambda m, x: torch._foreach_copy_([m.hidden], [m.hidden * 1.5]),
    "by out": lambda m, x: torch.mul(m.hidden, 1.5, out=m.hidden),
    "by out of sort": sorted_into,
    "by a view": lambda m, x: m.hidden.view(1, 1)[0].mul_(1.5),
    "by setitem": lambda m, x: m.hidden.__setitem__(0, m.hidden[0] * 1.5),
    "by an operator of somebody else": lambda m, x: double(m.hidden),
    "assigned": assigned,
    "its data assigned": set_to,
    "from x": lambda m, x: m.hidden.copy_(x.nan_to_num().abs().amax().clamp(0.1, 9)),
    "averaged with x": lambda m, x: m.hidden.lerp_(
        x.nan_to_num().abs().mean().clamp(0.1, 9)[None].to(m.hidden.dtype), 0.5
    ),
    "by index_put": lambda m, x: m.hidden.index_put_((torch.tensor([0]),), m.hidden * 1.5),
    "by masked fill": lambda m, x: m.hidden.masked_fill_(x.nan_to_num().sum() < 0, 3.0),
    "by zero": lambda m, x: m.hidden.zero_(),
    "by addcmul": lambda m, x: m.hidden.addcmul_(m.hidden, m.hidden),
    "by relu with inplace": lambda m, x: F.relu(m.hidden.sub_(0.75), inplace=True),
    "by threshold": lambda m, x: F.threshold_(m.hidden, 2, 3.0),
    "by dropout": lambda m, x: F.dropout(m.hidden, 0.5, True, True),
}
AFTER = {
    "factor after": lambda m, x: m.factor.mul_(1.5),
    "codes after": lambda m, x: m.codes.bitwise_xor_(1),
    "one code after": lambda m, x: m.codes.view(-1)[:1].bitwise_xor_(1),
    "scales after": lambda m, x: m.scales.copy_(m.scales.roll(1, 0)),
    "codes by x after": lambda m, x: m.codes.bitwise_xor_((x.nan_to_num().sum() < 0).to(m.codes.dtype)),
}
ALIASED = {
    "base after": then_write(lambda m, x: m.base[8:9].bitwise_xor_(1)),
    "base before": lambda m, inner, w, x: (m.base[8:9].bitwise_xor_(1), inner(m, m.weight(), x))[1],
}
DRAWS = {
    "rand": lambda o: torch.rand(1).round(),
    "randn": lambda o: torch.randn(1).sign(),
    "randint": lambda o: torch.randint(2, (1,)),
    "rand_like": lambda o: torch.rand_like(o).round(),
    "randn_like": lambda o: torch.randn_like(o).sign(),
    "randint_like": lambda o: torch.randint_like(o, 2),
    "randperm": lambda o: torch.randperm(2)[:1],
    "normal": lambda o: torch.normal(o).sign(),
    "bernoulli": lambda o: torch.bernoulli(o * 0.5),
    "multinomial": lambda o: torch.multinomial(torch.ones(2), 1),
    "poisson": lambda o: torch.poisson(o),
    "binomial": lambda o: torch.binomial(o, o * 0.5),
    "dropout": lambda o: F.dropout(o),
    "torch dropout": lambda o: torch.dropout(o, 0.5, True),
    "dropout_": lambda o: torch.dropout_(o.clone(), 0.5, True),
    "native_dropout": lambda o: torch.native_dropout(o, 0.5, True)[0],
    "feature_dropout": lambda o: torch.feature_dropout(o[None], 0.5, True)[0],
    "feature_dropout_": lambda o: torch.feature_dropout_(o[None].clone(), 0.5, True)[0],
    "alpha_dropout": lambda o: F.alpha_dropout(o, 0.5, True),
    "alpha_dropout_": lambda o: torch.alpha_dropout_(o.clone(), 0.5, True),
    "feature_alpha_dropout": lambda o: torch.feature_alpha_dropout(o[None], 0.5, True)[0],
    "dropout1d": lambda o: F.dropout1d(o[None, None])[0, 0],
    "dropout2d": lambda o: F.dropout2d(o[None, None, None])[0, 0, 0],
    "rrelu": lambda o: F.rrelu(-o, 0.0, 1.0, True).round(),
    "rrelu_": lambda o: torch.rrelu_(-o, 0.0, 1.0, True).round(),
    "attention": lambda o: F.scaled_dot_product_attention(o[None, None], o[None, None], o[None, None], dropout_p=0.5)[
        0, 0
    ],
    "pooling": lambda o: (
        F.fractional_max_pool2d(torch.arange(16.0).view(1, 1, 4, 4), 2, output_size=2)[0, 0, 0, :1] / 8
    ),
    "gamma": lambda o: torch._standard_gamma(o).round(),
    "dirichlet": lambda o: torch._sample_dirichlet(o.expand(2))[:1].round(),
    "gumbel_softmax": lambda o: F.gumbel_softmax(torch.zeros(2), hard=True)[:1],
    "aten bernoulli": lambda o: torch.ops.aten.bernoulli.p(o, 0.5),
    "aten rand_like": lambda o: torch.ops.aten.rand_like.default(o).round(),
    "aten randint": lambda o: torch.ops.aten.randint.default(2, [1]),
    "uniform_": lambda o: torch.empty(1).uniform_().round(),
    "normal_": lambda o: torch.empty(1).normal_().sign(),
    "bernoulli_": lambda o: torch.empty(1).bernoulli_(),
    "exponential_": lambda o: torch.empty(1).exponential_().round(),
    "cauchy_": lambda o: torch.empty(1).cauchy_().sign(),
    "geometric_": lambda o: torch.empty(1).geometric_(0.5),
    "log_normal_": lambda o: torch.empty(1).log_normal_().round(),
}
THEN = {
    "codes written": lambda m: m.codes.bitwise_xor_(1),
    "one code written": lambda m: m.codes.view(-1)[:1].bitwise_xor_(1),
    "codes rolled": lambda m: m.codes.copy_(m.codes.roll(1, 0)),
    "scales written": lambda m: m.scales.copy_(m.scales.flip(0)),
    "factor written": lambda m: m.factor.mul_(1.5),
    "factor replaced": lambda m: setattr(m, "factor", m.factor * 1.5),
    "codes replaced": lambda m: setattr(m, "codes", m.codes.roll(1, 0)),
    "data replaced": lambda m: setattr(m.codes, "data", m.codes.data.roll(1, 0)),
    "strides replaced": lambda m: setattr(m.codes, "data", m.codes.data.view(m.codes.shape[::-1]).t()),
    "swapped": lambda m: torch.utils.swap_tensors(m.codes, m.codes.roll(1, 0)),
    "loaded": lambda m: m.load_state_dict({"codes": m.codes.roll(1, 0)}, strict=False),
    "copied": lambda m: torch._foreach_copy_([m.codes], [m.codes.roll(1, 0)]),
    "scale of zero": lambda m: m.scales.view(-1)[:1].zero_(),
    "a factor of zero": lambda m: m.factor.zero_(),
    "negative factor": lambda m: m.factor.neg_(),
    "storage set": lambda m: m.codes.set_(m.codes.roll(1, 0).contiguous()),
    "assigned by loading": lambda m: m.load_state_dict({"codes": m.codes.roll(1, 0)}, strict=False, assign=True),
    "by out": lambda m: torch.bitwise_xor(m.codes, 1, out=m.codes),
    "factor of another size": lambda m: setattr(m, "factor", m.factor.expand(2)[:1] * 2),
}
TABLE = {
    "table": lambda m: m.table.mul_(2),
    "table entry": lambda m: m.table.__setitem__(5, 3.5),
    "table exchanged": lambda m: m.table.copy_(m.table.flip(0)),
}


def own_table(m) -> None:
    """The model holds its table itself."""
    from programs.written import TABLE as values

    m.register_buffer("table", values.clone())
    m.values = lambda m: m.table[m.unpack(m).int()]


def drawn(draw):
    return lambda m, w: w * (1 + draw(torch.ones(1))).to(w.dtype)


def _named(prefix: str, changes: dict, wrap) -> dict:
    return {f"{prefix}: {name}": wrap(change) for name, change in changes.items()}


NEAR: list[Mutation] = [
    *(
        Mutation(f"hidden state: {which}", "multiply", after_batch_norm(which), batch_norm)
        for which in ("running_mean", "running_var")
    ),
    Mutation("hidden state: functional batch norm", "multiply", after_functional_batch_norm, batch_norm),
    Mutation("hidden state: instance norm", "multiply", after_instance_norm, batch_norm),
    Mutation("hidden state: embedding", "multiply", after_embedding, embedding),
    Mutation("hidden state: embedding bag", "multiply", after_embedding_bag, embedding),
    *mutations("multiply", _named("hidden state", WRITES, then_written), prepare=number),
    *mutations("multiply", _named("written", AFTER, then_write)),
    *mutations("multiply", {f"written: {name}": change for name, change in ALIASED.items()}, prepare=alias),
    *mutations("decode", _named("random", DRAWS, drawn)),
    *(Mutation(f"later: {name}", then=then) for name, then in THEN.items()),
    *(Mutation(f"later: {name}", prepare=own_table, then=then) for name, then in TABLE.items()),
]
