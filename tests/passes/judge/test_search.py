"""Ways to write an FP4 linear in plain torch: each runs as the op, through the backend, and equals eager."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import E2M1_VALUES, explain, quantize_mxfp4, quantize_nvfp4

N, K = 48, 64
TABLE = torch.tensor(E2M1_VALUES)
PAIRS = torch.stack((TABLE.repeat(16), TABLE.repeat_interleave(16)), -1)
QUANTIZERS = {"e4m3": quantize_nvfp4, "e8m0": quantize_mxfp4}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}


def by_table(m) -> Tensor:
    return TABLE[torch.stack((m.codes & 15, m.codes >> 4), -1).flatten(-2).int()]


def by_table_of_pairs(m) -> Tensor:
    return torch.index_select(PAIRS, 0, m.codes.flatten().int()).view(N, K)


def by_setitem(m) -> Tensor:
    out = torch.empty(N, K)
    out[:, 0::2] = TABLE[(m.codes & 15).long()]
    out[:, 1::2] = TABLE[(m.codes >> 4).long()]
    return out


def high_first(m) -> Tensor:
    return TABLE[torch.stack((m.codes >> 4, m.codes & 15), -1).flatten(-2).int()]


def in_planes(m) -> Tensor:
    """Low nibbles are the first half of a row, high ones the second: the groups of a row mix those of its bytes."""
    return TABLE[torch.cat((m.codes & 15, m.codes >> 4), -1).int()]


def nibbles(m) -> Tensor:
    return torch.stack((m.codes & 15, m.codes >> 4), -1).flatten(-2).to(torch.int16)


def by_bits_of_bfloat16(m) -> Tensor:
    bits = (nibbles(m) & 8) << 12 | (nibbles(m) & 7) << 6
    return (bits.view(torch.bfloat16) * 2.0**126).float()


def by_bits_of_float16(m) -> Tensor:
    bits = (nibbles(m) & 8) << 12 | (nibbles(m) & 7) << 9
    return (bits.view(torch.float16) * 2.0**14).float()


def by_where(m) -> Tensor:
    c = nibbles(m)
    exponent, mantissa = (c >> 1) & 3, (c & 1).float()
    magnitude = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * torch.exp2(exponent.float() - 1))
    return torch.where(c >= 8, -magnitude, magnitude)


def float8(m) -> Tensor:
    return m.scales.view(FLOAT8[m.kind]).float()


def exp2(m) -> Tensor:
    return torch.exp2(m.scales.float() - 127)


def ldexp(m) -> Tensor:
    return torch.ldexp(torch.ones(m.scales.shape), m.scales.int() - 127)


def shift(m) -> Tensor:
    return (m.scales.int() << 23).view(torch.float32)


class Spelled(nn.Module):
    """A linear that decodes its weight as it is told: codes, scales and global factor apart."""

    def __init__(self, kind="e4m3", group=None, dtype=torch.float32, codes=by_table, scales=float8, factor="times"):
        super().__init__()
        weight = QUANTIZERS[kind](torch.randn(N, K), *(() if group is None else (group,)))
        swapped = (weight.codes << 4) | (weight.codes >> 4)
        self.kind, self.dtype, self.decode_codes, self.decode_scales, self.use = kind, dtype, codes, scales, factor
        self.register_buffer("codes", swapped if codes is high_first else weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("factor", 1 / weight.multiplier[:1] if factor == "divided" else weight.multiplier[:1])

    def weight(self) -> Tensor:
        scales, codes = self.decode_scales(self), self.decode_codes(self)
        if self.use == "times":
            scales = scales * self.factor
        if self.use == "divided":
            scales = scales / self.factor
        return (codes.view(*scales.shape, -1) * scales.unsqueeze(-1)).view(N, K).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight())


class Float8Scales(Spelled):
    """Scales stored in a float8 dtype."""

    def __init__(self, **choices):
        super().__init__(**choices)
        self.scales = self.scales.view(FLOAT8[self.kind])


class FactorLast(Spelled):
    """The global factor over the whole weight, after its rounding to the compute dtype."""

    def weight(self) -> Tensor:
        blocks = self.decode_codes(self).to(self.dtype).view(N, -1, K // self.scales.shape[1])
        weight = (blocks * self.decode_scales(self).to(self.dtype).unsqueeze(-1)).view(N, K)
        return weight * self.factor.to(self.dtype)


class WithoutGrad(Spelled):
    """A trainable factor that no gradient reaches."""

    def __init__(self, **choices):
        super().__init__(**choices)
        self.factor = nn.Parameter(self.factor)

    def weight(self) -> Tensor:
        with torch.no_grad():
            return super().weight()


class PerRow(Spelled):
    """One factor for each row."""

    def __init__(self, **choices):
        super().__init__(**choices)
        self.factor = torch.rand(N, 1)


class Transposed(Spelled):
    """Stored as ``[K, N]``, codes and scales along the first axis."""

    def __init__(self, **choices):
        super().__init__(**choices)
        self.codes, self.scales = self.codes.t().contiguous(), self.scales.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        codes = TABLE[torch.stack((self.codes & 15, self.codes >> 4), 1).view(K, N).int()]
        scales = (float8(self) * self.factor).repeat_interleave(K // self.scales.shape[0], 0)
        return x @ (codes * scales).to(self.dtype)


SPELLINGS = {
    "table": Spelled, "literal table": partial(Spelled,
         codes=lambda m: torch.tensor(E2M1_VALUES)[torch.stack((m.codes & 15, m.codes >> 4), -1).flatten(-2).int()]),
    "table of pairs": partial(Spelled, codes=by_table_of_pairs), "setitem": partial(Spelled, codes=by_setitem),
    "where": partial(Spelled, codes=by_where), "bfloat16 bits": partial(Spelled, codes=by_bits_of_bfloat16),
    "float16 bits": partial(Spelled, codes=by_bits_of_float16),
    "high nibble first": partial(Spelled, codes=high_first), "nibbles in planes": partial(Spelled, codes=in_planes),
    "divided factor": partial(Spelled, factor="divided"), "no factor": partial(Spelled, factor="none"),
    "factor last": FactorLast, "factor per row": PerRow, "without grad": WithoutGrad, "e4m3 dtype": Float8Scales,
    "e8m0 dtype": partial(Float8Scales, kind="e8m0"), "e8m0 bytes": partial(Spelled, kind="e8m0"),
    "e8m0 exp2": partial(Spelled, kind="e8m0", scales=exp2, factor="none"),
    "e8m0 ldexp": partial(Spelled, kind="e8m0", scales=ldexp),
    "e8m0 shift": partial(Spelled, kind="e8m0", scales=shift), "e4m3 group 32": partial(Spelled, group=32),
    "e8m0 group 16": partial(Spelled, kind="e8m0", group=16), "transposed": Transposed,
    "transposed e8m0": partial(Transposed, kind="e8m0"),
}  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def assert_replaced(caplog, assert_near):
    """Runs a module through the backend: its one weight is replaced, the result is that of eager."""

    def check(module, x: Tensor, message: str = "replaced 1 of 1 FP4 linears", **options) -> None:
        caplog.set_level("INFO", "marlin_w4a16")
        compiled = torch.compile(module, backend="marlin_w4a16", fullgraph=True, options=options or None)
        assert_near(compiled(x), module(x))
        assert [r.message.startswith(message) for r in caplog.records if r.name == "marlin_w4a16"] == [True]

    return check


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_a_spelling_is_recognised(assert_replaced, spelled):
    assert_replaced(spelled(), torch.randn(3, K))


@DTYPES
@pytest.mark.parametrize(
    "kind, spelling", [("e4m3", Spelled), ("e8m0", Spelled), ("e8m0", FactorLast), ("e4m3", Transposed)]
)
def test_a_weight_computed_in_sixteen_bits_is_recognised(assert_replaced, kind, spelling, dtype):
    assert_replaced(spelling(kind=kind, dtype=dtype), torch.randn(3, K, dtype=dtype))


@DTYPES
def test_a_weight_rounded_twice_is_recognised_within_a_tolerance(assert_replaced, dtype):
    module, x = FactorLast(dtype=dtype), torch.randn(3, K, dtype=dtype)
    module.factor.fill_(0.0013)
    (row,) = explain(module, x).rejected
    assert "rounded twice in the model" in row.outcome.reason and "options={'tolerance': 2**-" in row.outcome.reason
    assert_replaced(module, x, tolerance=2**-7)


@pytest.mark.parametrize("kind, group, name", [("e4m3", 16, "NVFP4"), ("e8m0", 32, "MXFP4"), ("e4m3", 32, "FP4 e4m3")])
def test_the_format_is_named(assert_replaced, kind, group, name):
    message = f"replaced 1 of 1 FP4 linears (1 {name} group {group}; "
    assert_replaced(Spelled(kind=kind, group=group), torch.randn(3, K), message)


class Product(Spelled):
    """Another function in the place of F.linear."""

    def __init__(self, product):
        super().__init__()
        self.product = product
        self.bias = nn.Parameter(torch.randn(N))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight(), self.bias)


PRODUCTS = {
    "linear with bias": lambda x, w, b: linear(x, w, b),
    "linear by keywords": lambda x, w, b: linear(bias=b, weight=w, input=x), "@": lambda x, w, b: x @ w.T,
    "torch.matmul": lambda x, w, b: torch.matmul(x, w.t()),
    "matmul method": lambda x, w, b: x.matmul(w.transpose(0, 1)), "torch.mm": lambda x, w, b: torch.mm(x, w.mT),
    "mm method": lambda x, w, b: x.mm(w.permute(1, 0).contiguous()),
}  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_is_recognised(assert_replaced, product):
    assert_replaced(Product(product), torch.randn(3, K))


@pytest.mark.parametrize("product", [PRODUCTS["linear with bias"], PRODUCTS["@"]], ids=["linear", "@"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
def test_inputs_of_any_rank(assert_replaced, product, leading):
    assert_replaced(Product(product), torch.randn(*leading, K))


class Stacked(nn.Module):
    """Two weights as a batch of matrices."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Spelled(), Spelled()

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.stack((self.first.weight().T, self.second.weight().T))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (4, 1, 3), (4, 2, 3)])
def test_a_batch_of_weights(assert_replaced, leading):
    batched = len(leading) > 1 and leading[-2] == 2  # otherwise each of the inputs meets every weight
    what = "stacks of FP4 matrices" if batched else "FP4 linears"
    assert_replaced(Stacked(), torch.randn(*leading, K), f"replaced 1 of 1 {what}")


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_weight_of_zeros(assert_replaced, kind):
    module = Spelled(kind=kind)
    module.codes.zero_()
    assert_replaced(module, torch.randn(3, K))


class Twice(Spelled):
    """One weight in two forms of product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight()) + x @ self.weight().T


class Tied(Spelled):
    """One tensor of codes with two factors."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = by_table(self).view(*self.scales.shape, -1) * float8(self).unsqueeze(-1)
        return linear(x, self.weight()) + linear(x, blocks.view(N, K))


@pytest.mark.parametrize("module", [Twice, Tied])
def test_codes_that_two_weights_share(assert_replaced, module):
    assert_replaced(module(), torch.randn(3, K), "replaced 2 of 2 FP4 linears")


def test_the_path_is_that_of_the_codes():
    """Though the scales are read first."""
    (row,) = explain(Spelled(), torch.randn(3, K)).rows
    assert row.path == "codes"
