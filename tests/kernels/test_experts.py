"""The order in which the rows of experts are packed, its inverse, and what stands between the products."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.expert_order import ORDERS, packed_rows
from marlin_w4a16.kernels.experts import (
    fit_each,
    pack_bias,
    pack_each,
    pack_experts,
    pack_first,
    unpack_bias,
    unpack_experts,
)
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.scale_bytes import scale_values
from mixtures.oracle import ACTIVATIONS, activated
from weights import equal

EVERY_ORDER = pytest.mark.parametrize("order", [None, *ORDERS])
FORMATS = [("e4m3", 16), ("e4m3", 32), ("e8m0", 32), ("e8m0", 16)]


def draw(random_weight, experts: int, hidden: int, intermediate: int, order, first=FORMATS[0], second=FORMATS[0]):
    """Both weights; the second has columns in whole groups."""
    rows, columns = intermediate * (1 if order is None else 2), -(-intermediate // second[1]) * second[1]
    w13 = random_weight(rows, hidden, *first, lead=(experts,), e8m0=(0, 254))
    return w13, random_weight(hidden, columns, *second, lead=(experts,), seed=1)


def test_rows_stand_in_pairs_of_eight():
    assert packed_rows(16, 16, "gate_up").tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert packed_rows(16, 16, "up_gate").tolist() == [*range(16, 24), *range(8), *range(24, 32), *range(8, 16)]
    assert packed_rows(8, 8, "interleaved").tolist() == [*range(0, 16, 2), *range(1, 16, 2)]
    assert packed_rows(8, 8, "interleaved_up_gate").tolist() == [*range(1, 16, 2), *range(0, 16, 2)]
    assert packed_rows(5, 8, None).tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
    assert packed_rows(3, 8, "gate_up").tolist() == [0, 1, 2, *[-1] * 5, 3, 4, 5, *[-1] * 5]


@EVERY_ORDER
@pytest.mark.parametrize("intermediate, width", [(64, 64), (100, 112), (1, 16), (2880, 2880), (704, 768), (8, 32)])
def test_every_row_stands_once_and_beside_its_partner(order, intermediate, width):
    rows, halves = packed_rows(intermediate, width, order), 1 if order is None else 2
    assert len(rows) == halves * width
    assert rows[rows >= 0].sort().values.tolist() == list(range(halves * intermediate))
    if order is not None:
        gate, up = rows.view(-1, 2, 8).unbind(1)
        step = {"gate_up": intermediate, "up_gate": -intermediate, "interleaved": 1, "interleaved_up_gate": -1}[order]
        assert torch.equal((up - gate)[gate >= 0], torch.full((intermediate,), step))
        assert torch.equal(gate < 0, up < 0)


@EVERY_ORDER
@pytest.mark.parametrize("intermediate", [64, 96, 100, 176, 192, 704])
def test_packing_is_that_of_the_rows_in_their_order(random_weight, order, intermediate):
    w13, w2 = draw(random_weight, 3, 64, intermediate, order)
    first, second = pack_experts(w13, w2, order)
    assert equal(second, pack(w2))
    dense, rows = w13.decode(), packed_rows(intermediate, w2.k, order)
    expected = torch.where((rows >= 0)[:, None], dense[:, rows.clamp(min=0)], 0.0)
    assert torch.equal(first.unpack().decode(), expected)
    for expert in range(3):
        one = replace(w13, codes=w13.codes[expert], scales=w13.scales[expert], multiplier=w13.multiplier[expert])
        assert torch.equal(first.matrix(expert).unpack().decode()[rows >= 0], one.decode()[rows[rows >= 0]])


@pytest.mark.parametrize("intermediate", [64, 96, 100, 176, 192, 704, 1856, 2880])
@pytest.mark.parametrize("order", [None, "gate_up", "interleaved"])
@pytest.mark.parametrize("first, second", list(product(FORMATS[:3], FORMATS[:3])))
def test_unpacking_gives_every_bit_back(random_weight, intermediate, order, first, second):
    w13, w2 = draw(random_weight, 2, 32, intermediate, order, first, second)
    found13, found2 = unpack_experts(*pack_experts(w13, w2, order), order, intermediate, "mixture")
    assert equal(found13, w13) and equal(found2, w2)
    assert (found13.name, found2.name) == ("mixture.w13", "mixture.w2")


@st.composite
def mixtures(draw) -> dict:
    order = draw(st.sampled_from([None, *ORDERS]))
    first, second = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(FORMATS))
    intermediate, more = draw(st.integers(1, 150)), draw(st.integers(0, (127 - second[1]) // second[1]))
    return dict(
        experts=draw(st.integers(0, 5)), hidden=first[1] * draw(st.integers(1, 5)), out=draw(st.integers(1, 130)),
        intermediate=intermediate, columns=(-(-intermediate // second[1]) + more) * second[1], order=order,
        first=first, second=second, seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip


def any_stack(experts: int, n: int, k: int, kind: str, group: int) -> FP4Weight:
    scales = torch.randint(255 if kind == "e8m0" else 127, (experts, n, k // group))
    if kind == "e4m3":
        scales += 0x80 * torch.randint(2, scales.shape)
    codes = torch.randint(256, (experts, n, k // 2), dtype=torch.uint8)
    return FP4Weight(codes, scales.to(torch.uint8), torch.randn(experts, n), kind, group)


@given(mixtures())
@settings(max_examples=150, deadline=None)
def test_any_mixture_comes_back(m):
    torch.manual_seed(m["seed"])
    w13 = any_stack(m["experts"], m["intermediate"] * (1 if m["order"] is None else 2), m["hidden"], *m["first"])
    w2 = any_stack(m["experts"], m["out"], m["columns"], *m["second"])
    packed = pack_experts(w13, w2, m["order"])
    found = unpack_experts(*packed, m["order"], m["intermediate"])
    assert equal(found[0], w13) and equal(found[1], w2)
    assert packed[0].n == m["columns"] * (1 if m["order"] is None else 2)


def parts_of(weight: FP4Weight, *sizes: int) -> list[FP4Weight]:
    """Its matrices, in stacks of so many; 0 is one that is no stack."""
    found, start = [], 0
    for size in sizes:
        at = slice(start, start + size) if size else start
        start += size or 1
        found.append(weight.derived(weight.codes[at], weight.scales[at], weight.multiplier[at]))
    return found


@EVERY_ORDER
@pytest.mark.parametrize("sizes", [(5,), (0, 0, 0, 0, 0), (2, 3), (1, 0, 3)])
def test_some_at_a_time_are_packed_as_all_at_once(random_weight, order, sizes):
    w13, w2 = draw(random_weight, 5, 64, 100, order)
    first, second = pack_experts(w13, w2, order)
    assert equal(pack_first(parts_of(w13, *sizes), 5, w2.k, order), first)
    assert equal(pack_each(parts_of(w2, *sizes), 5), second)
    into = pack_experts(w13, w2, order)
    assert pack_each(parts_of(w2, *sizes), 5, into[1]) is into[1] and equal(into[1], second)


@pytest.mark.parametrize("sizes", [(), (2, 2), (0, 0, 0)])
def test_too_few_are_refused(random_weight, sizes):
    _, w2 = draw(random_weight, 5, 64, 96, None)
    with pytest.raises(ValueError, match=rf"^experts: found {sum(s or 1 for s in sizes)} matrices, expected 5$"):
        pack_each(parts_of(w2, *sizes), 5)


def test_too_many_or_others_are_refused(random_weight):
    _, w2 = draw(random_weight, 5, 64, 96, None)
    for parts in (parts_of(w2, 2, 3), [*parts_of(w2, 2), random_weight(64, 96, lead=(1,), group=32)]):
        with pytest.raises(ValueError, match="another shape or format"):
            pack_each(parts, 3)


def test_each_matrix_is_fitted_by_itself():
    """In float16 if it holds all of its rows, else in the other dtype: here as they are, moved, in bfloat16, moved."""
    weight = any_stack(4, 3, 64, "e8m0", 32)
    scales = weight.scales.clamp(120, 130)
    scales[1, 0], scales[2, 2, 0], scales[3] = 60, 30, 200
    weight = replace(weight, scales=scales)
    fitted = fit_each(weight, torch.float16, torch.bfloat16)
    alone = [one.fit_first(torch.float16, torch.bfloat16) for one in parts_of(weight, 0, 0, 0, 0)]
    assert all(equal(one, other) for one, other in zip(parts_of(fitted, 0, 0, 0, 0), alone, strict=True))
    assert (fitted.scales != scales).any(-1).tolist() == [[False] * 3, [True, False, False], [False] * 3, [True] * 3]
    fine = parts_of(weight, 1)[0]
    assert fit_each(fine, torch.float16, torch.bfloat16) is fine
    with pytest.raises(ValueError, match="row 2 holds powers of two from -97"):
        fit_each(weight, torch.float16)


def test_what_is_packed_is_returned_as_it_is(random_weight):
    packed = pack_experts(*draw(random_weight, 2, 64, 96, "gate_up"), "gate_up")
    assert all(a is b for a, b in zip(pack_experts(*packed, "gate_up"), packed, strict=True))


@EVERY_ORDER
@pytest.mark.parametrize("kind, group", FORMATS)
def test_rows_that_are_filled_up_hold_zeros_and_scales_of_one(random_weight, order, kind, group):
    w13, w2 = draw(random_weight, 2, 64, 100, order, (kind, group))
    first, empty = pack_experts(w13, w2, order)[0].unpack(), packed_rows(100, w2.k, order) < 0
    assert bool(empty.any())
    assert not bool(first.codes[:, empty].any()) and not bool(first.multiplier[:, empty].any())
    assert bool((scale_values(first.scales, kind)[:, empty] == 1).all())


@EVERY_ORDER
def test_biases_stand_as_rows_do(order):
    rows = 100 * (1 if order is None else 2)
    bias = torch.randn(3, rows, requires_grad=True)
    found, at = pack_bias(bias, 112, order), packed_rows(100, 112, order)
    assert torch.equal(found[:, at >= 0], bias[:, at[at >= 0]]) and not bool(found[:, at < 0].any())
    assert found.shape == (3, len(at)) and found.dtype == bias.dtype
    assert torch.equal(unpack_bias(found, 100, order), bias)
    assert torch.equal(torch.autograd.grad(found.sum(), bias)[0], torch.ones(3, rows))


def test_weights_that_do_not_belong_together_are_refused(random_weight):
    def refused(message: str, w13: FP4Weight, w2: FP4Weight, order) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            pack_experts(w13, w2, order)

    w13, w2 = draw(random_weight, 3, 64, 96, "gate_up")
    refused("weight: found [3, 192] rows, expected [experts, i] for a second product of 96 columns", w13, w2, None)
    odd = random_weight(191, 64, lead=(3,))
    refused("weight: found [3, 191] rows, expected [experts, 2 i] for a second product of 96", odd, w2, "gate_up")
    wide = random_weight(64, 256, lead=(3,))
    refused("[3, 192] rows, expected [experts, 2 i] for a second product of 256 columns", w13, wide, "gate_up")
    narrow = random_weight(64, 80, lead=(3,))
    refused("[3, 192] rows, expected [experts, 2 i] for a second product of 80 columns", w13, narrow, "gate_up")
    refused("weight: found [192] rows, expected [experts, 2 i]", random_weight(192, 64), w2, "gate_up")
    fewer = random_weight(64, 96, lead=(2,))
    refused("experts: found weights of [3, 192] and [2, 64] rows, expected one matrix", w13, fewer, "gate_up")
    one = random_weight(64, 96)
    refused("experts: found weights of [3, 192] and [64] rows, expected one matrix", w13, one, "gate_up")


class Largest(TorchDispatchMode):
    """The most bytes an operator made, packed tensors apart."""

    def __init__(self, apart: set[int]) -> None:
        super().__init__()
        self.apart, self.nbytes = apart, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().nbytes() not in self.apart:
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


def test_packing_takes_the_memory_of_one_expert_at_a_time(random_weight):
    w13, w2 = draw(random_weight, 64, 256, 96, "interleaved")
    first, second = pack_experts(w13, w2, "interleaved")
    tensors = [t for p in (first, second) for t in (p.words, p.scales, p.multiplier)]
    inputs = [t for w in (w13, w2) for t in (w.codes, w.scales, w.multiplier)]
    with Largest({t.untyped_storage().nbytes() for t in (*tensors, *inputs)}) as largest:
        pack_experts(w13, w2, "interleaved")
    one = w13.codes[0].numel()
    assert one <= largest.nbytes <= 16 * one


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_of_packed_rows_is_that_of_the_model(name):
    activation, order = ACTIVATIONS[name]
    sums, intermediate = 3 * torch.randn(5, 192, dtype=torch.float64), 192 // (2 if activation.gated else 1)
    packed = sums[:, packed_rows(intermediate, intermediate, order)]
    torch.testing.assert_close(activation.of_rows(packed), activated(activation, order, sums), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_of_an_activation_is_that_of_autograd(name):
    activation, _ = ACTIVATIONS[name]
    limits = [n for n in (activation.gate_limit, activation.up_limit) if n is not None]
    draw = 3 * torch.randn(5, 192, dtype=torch.float64)
    for limit in limits:  # what the gradient is at a limit depends on torch
        draw[0, ::3], draw[1, ::3] = limit, -limit
    sums = draw.requires_grad_()
    out = activation.of_rows(sums)
    grad = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, sums, grad)
    torch.testing.assert_close(activation.gradient_of_rows(grad, sums.detach()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "activation, told",
    [
        (Activation(), "silu(gate) * up"),
        (Activation("silu", True, 1.702, 7.0, 7.0, 1.0), "silu(gate <= 7, 1.702) * (up in +-7 + 1)"),
        (Activation(gate_limit=10.0, up_limit=10.0), "silu(gate <= 10) * up in +-10"),
        (Activation("relu2", False), "relu2(z)"),
        (Activation("gelu", False, gate_limit=2.5), "gelu(z <= 2.5)"),
    ],
)
def test_an_activation_is_told_to_people(activation, told):
    assert str(activation) == told
