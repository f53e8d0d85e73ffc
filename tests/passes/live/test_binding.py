import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.kernels.expert_order import ORDERS, packed_rows
from marlin_w4a16.kernels.fp4 import E2M1_VALUES
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.judge.decode import Decode
from marlin_w4a16.passes.judge.search import recognise
from marlin_w4a16.passes.judge.verdict import Found
from marlin_w4a16.passes.live.binding import Binding, fit
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.settings import Rules

N, K = 48, 64


def leaves() -> list[Tensor]:
    weight = quantize_nvfp4(torch.randn(N, K))
    return [weight.codes, weight.scales.view(torch.float8_e4m3fn), weight.multiplier[0].clone()]


def elements(codes: Tensor) -> Tensor:
    return torch.tensor(E2M1_VALUES)[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]


def plain(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    return (elements(codes).unflatten(-1, (-1, 16)) * scales.float().unsqueeze(-1) * factor).flatten(-2)


def swapped(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    return plain((codes << 4) | (codes >> 4), scales, factor)


def rounded(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    return plain(codes, scales, factor.bfloat16().float())


def powers(codes: Tensor, scales: Tensor) -> Tensor:
    return (elements(codes).unflatten(-1, (-1, 32)) * scales.float().unsqueeze(-1)).flatten(-2)


@dataclass(eq=False)
class Counted(Decode):
    """The traced operations, and how often they ran."""

    calls: int = 0

    def traced(self, leaves) -> Tensor:
        self.calls += 1
        return super().traced(leaves)


@pytest.fixture
def decoder(decode_of) -> Counted:
    return decode_of(plain, *leaves(), cls=Counted)


def bound_to(decode: Decode, values: list[Tensor], dtype: torch.dtype = torch.bfloat16) -> Binding:
    found = recognise(decode, values, "weight", Rules())
    assert isinstance(found, Found)
    return Binding(decode, found, Rules(), dtype, "weight")


@pytest.fixture
def binding(decoder) -> Binding:
    """Was compiled for a weight that the graph is no longer called with."""
    first = leaves()
    found = recognise(decoder, first, "weight", Rules())
    bound = Binding(decoder, found, Rules(), torch.bfloat16, "weight")
    assert isinstance(bound.adopt(first, found.weight), PackedFP4)
    decoder.calls = 0
    return bound


def assert_holds(packed: PackedFP4 | Rejected, values: list[Tensor]) -> None:
    assert torch.equal(dequantize(packed, torch.float32), plain(*values))


def test_what_was_proved_at_compile_time_is_not_evaluated_again(decoder):
    first = leaves()
    found = recognise(decoder, first, "weight", Rules())
    binding = Binding(decoder, found, Rules(), torch.bfloat16, "weight")
    decoder.calls = 0
    assert binding.adopt(first, found.weight) is binding.packed(first)
    assert_holds(binding.packed(first), first)
    assert decoder.calls == 0


def test_each_set_of_leaves_is_packed_once(binding, decoder):
    sets = [leaves() for _ in range(3)]
    for values in sets * 3:
        assert_holds(binding.packed(values), values)
    assert decoder.calls == 3


def test_leaves_may_be_shared(binding):
    a = leaves()
    b = [a[0], a[1], torch.tensor(0.25)]
    for values in (a, b, a):
        assert_holds(binding.packed(values), values)


def test_leaves_at_one_address_are_told_apart(binding):
    codes, scales, factor = leaves()
    both = torch.cat((codes, leaves()[0]))
    for values in ([both[:N], scales, factor], [both[::2], scales, factor]):
        assert_holds(binding.packed(values), values)


def test_bindings_that_read_the_same_tensors_alike_share_a_copy(decode_of):
    values = leaves()
    first, second = (bound_to(decode_of(plain, *values), values) for _ in range(2))
    turned = [values[1], values[2], values[0]]
    other_order = bound_to(decode_of(lambda s, f, c: plain(c, s, f), *turned), turned)
    packed = first.packed(values)
    assert second.packed(values) is packed and other_order.packed(turned) is packed


@pytest.mark.parametrize("function", [swapped, rounded])
def test_bindings_that_read_the_same_tensors_in_two_ways_do_not(decode_of, function):
    values = leaves()
    values[2].fill_(0.3)
    one, other = bound_to(decode_of(plain, *values), values), bound_to(decode_of(function, *values), values)
    for binding, expected in ((one, plain(*values)), (other, function(*values)), (one, plain(*values))):
        assert torch.equal(dequantize(binding.packed(values), torch.float32), expected)


def test_a_copy_for_bfloat16_is_not_shared_with_a_binding_for_float16(decode_of):
    dense = torch.randn(N, K)
    dense[:, : K // 2] *= 2.0**-60
    weight = quantize_mxfp4(dense)
    values = [weight.codes, weight.scales.view(torch.float8_e8m0fnu)]
    decode = decode_of(powers, *values)
    wide, narrow = bound_to(decode, values), bound_to(decode, values, torch.float16)
    assert isinstance(wide.packed(values), PackedFP4) and isinstance(narrow.packed(values), Rejected)


def stack_of(packed: PackedFP4) -> Tensor:
    """The rows of all matrices."""
    return torch.cat([dequantize(packed.matrix(i), torch.float32) for i in range(len(packed.words))])


def test_a_batch_is_packed_as_a_stack(decode_of):
    values = leaves()
    decode = decode_of(lambda *v: plain(*v).view(2, N // 2, K).mT, *values, multiply=lambda x, w: x.expand(2, 1, K) @ w)
    packed = bound_to(decode, values).packed(values)
    assert (len(packed.words), packed.n) == (2, N // 2) and torch.equal(stack_of(packed), plain(*values))


def test_a_changed_batch_is_packed_again_at_the_same_addresses(decode_of):
    values, others = leaves(), leaves()
    decode = decode_of(lambda *v: plain(*v).view(2, N // 2, K).mT, *values, multiply=lambda x, w: x.expand(2, 1, K) @ w)
    binding = bound_to(decode, values)
    address = binding.packed(values).words.data_ptr()
    values[0].copy_(others[0])
    again = binding.packed(values)
    assert again.words.data_ptr() == address and torch.equal(stack_of(again), plain(*values))


@pytest.mark.parametrize("order", ORDERS)
def test_gates_and_ups_are_packed_in_pairs_and_again_at_the_same_address(decode_of, order):
    values, others = leaves(), leaves()
    decode = decode_of(lambda *v: plain(*v).view(3, 16, K).mT, *values, multiply=lambda x, w: x.expand(3, 1, K) @ w)
    found = recognise(decode, values, "weight", Rules())
    paired, plainly = (Binding(decode, found, Rules(), torch.bfloat16, "weight", which) for which in (order, None))
    addresses = set()
    for _ in range(2):
        packed, rows = paired.packed(values), packed_rows(8, 8, order)
        addresses.add(packed.words.data_ptr())
        assert torch.equal(stack_of(plainly.packed(values)), plain(*values))
        assert torch.equal(stack_of(packed), torch.cat([part[rows] for part in plain(*values).view(3, 16, K)]))
        values[0].copy_(others[0])
    assert len(addresses) == 1


@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("how", ["in place", "data"])
def test_a_changed_leaf_is_packed_again_at_the_same_address(binding, decoder, i, how):
    values, others = leaves(), leaves()
    packed = binding.packed(values)
    addresses = [t.data_ptr() for t in (packed.words, packed.scales, packed.multiplier)]
    if how == "data":
        values[i].data = others[i]
    else:
        values[i].copy_(others[i])
    again = binding.packed(values)
    assert_holds(again, values)
    assert [t.data_ptr() for t in (again.words, again.scales, again.multiplier)] == addresses
    assert decoder.calls == 2
    binding.packed(values)
    assert decoder.calls == 2


@pytest.mark.parametrize("i", range(3))
def test_a_copy_dies_with_any_of_its_leaves(binding, i):
    kept, gone = leaves(), leaves()
    binding.packed(kept)
    copy, other = (weakref.ref(binding.packed(values).words) for values in (gone, kept))
    binding.packed(gone)
    del gone[i]
    gc.collect()
    assert copy() is None and other() is not None
    assert binding.packed(kept).words is other()


def test_copies_die_with_the_binding(decoder):
    values = leaves()
    binding = bound_to(decoder, values)
    copy = weakref.ref(binding.packed(values).words)
    del binding
    gc.collect()
    assert copy() is None


def test_leaves_at_the_ids_of_dead_ones_are_packed_anew(binding):
    for _ in range(50):
        values = leaves()
        assert_holds(binding.packed(values), values)


def test_leaves_made_in_inference_mode_need_no_version(binding, decoder):
    with torch.inference_mode():
        values = leaves()
        for _ in range(2):
            assert_holds(binding.packed(values), values)
    assert_holds(binding.packed(values), values)
    assert decoder.calls == 1


def test_a_copy_made_in_inference_mode_can_be_packed_over_outside(binding):
    values, others = leaves(), leaves()
    with torch.inference_mode():
        binding.packed(values)
    values[0].copy_(others[0])
    assert_holds(binding.packed(values), values)


def test_leaves_that_hold_the_weight_in_another_way_are_recognised(decoder):
    """As after compile time's weight was zeros, of which many recipes are true."""
    zeros = leaves()
    zeros[0].zero_()
    bound, values = bound_to(decoder, zeros), leaves()
    assert_holds(bound.packed(values), values)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda codes, scales, factor: scales.view(torch.uint8).fill_(0x7F), "found NaN (byte 0x7f)"),
        (lambda codes, scales, factor: factor.fill_(torch.inf), "holds NaN or Inf"),
    ],
)
def test_leaves_that_hold_no_weight_are_rejected(binding, spoil, reason):
    values = leaves()
    spoil(*values)
    refused = binding.packed(values)
    assert isinstance(refused, Rejected) and reason in refused.reason


def test_a_value_that_is_not_the_decode_is_rejected(decoder, decode_of):
    first = leaves()
    found = recognise(decoder, first, "weight", Rules())
    offset = decode_of(lambda *values: plain(*values) + 0.01, *first)
    assert isinstance(Binding(offset, found, Rules(), torch.bfloat16, "weight").packed(first), Rejected)


def test_scales_are_fitted_to_float16_where_they_can_be():
    dense = torch.randn(N, K) * 2.0**-30
    weight = fit(quantize_mxfp4(dense), torch.bfloat16)
    assert torch.equal(weight.decode(), quantize_mxfp4(dense).decode())
    assert weight.fit(torch.float16) is weight


def test_scales_that_only_bfloat16_holds_are_rejected_for_float16():
    dense = torch.randn(N, K)
    dense[:, : K // 2] *= 2.0**-60
    assert fit(quantize_mxfp4(dense), torch.bfloat16).kind == "e8m0"
    refused = fit(quantize_mxfp4(dense), torch.float16)
    assert isinstance(refused, Rejected) and "powers of two" in refused.reason
