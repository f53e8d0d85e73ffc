import gc
import weakref

import pytest
import torch
from torch import Tensor

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.kernels.fp4 import E2M1_VALUES
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.binding import Binding, fit
from marlin_w4a16.passes.outcome import Rejected
from marlin_w4a16.passes.recognise import recognise

N, K = 48, 64
TABLE = torch.tensor(E2M1_VALUES)


def leaves() -> list[Tensor]:
    weight = quantize_nvfp4(torch.randn(N, K))
    return [weight.codes, weight.scales.view(torch.float8_e4m3fn), weight.multiplier[0].clone()]


class Decoder:
    """Stands for the traced operations and counts how often they run."""

    def __init__(self):
        self.calls = 0

    def __call__(self, values) -> Tensor:
        self.calls += 1
        codes, scales, factor = values
        values = TABLE[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()].unflatten(-1, (-1, 16))
        return (values * scales.float().unsqueeze(-1) * factor).flatten(-2)


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def binding(decoder) -> Binding:
    first = leaves()
    recipe = recognise(Decoder()(first), first, "weight")
    bound = Binding(decoder, recipe, torch.bfloat16, "weight")
    assert isinstance(bound.adopt(first), PackedFP4)
    return bound


def assert_holds(packed, values: list[Tensor]) -> None:
    assert torch.equal(dequantize(packed, torch.float32), Decoder()(values))


def test_what_was_proved_at_compile_time_is_not_evaluated_again(decoder):
    first = leaves()
    binding = Binding(decoder, recognise(Decoder()(first), first, "weight"), torch.bfloat16, "weight")
    assert binding.adopt(first) is binding.packed(first)
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


def bound_to(decode, values: list[Tensor], dtype: torch.dtype = torch.bfloat16) -> Binding:
    recipe = recognise(decode(values), values, "weight")
    return Binding(decode, recipe, dtype, "weight")


def swapped(values) -> Tensor:
    codes, scales, factor = values
    return Decoder()([(codes << 4) | (codes >> 4), scales, factor])


def rounded(values) -> Tensor:
    codes, scales, factor = values
    return Decoder()([codes, scales, factor.bfloat16().float()]).bfloat16()


def test_bindings_that_read_the_same_tensors_alike_share_a_copy():
    values = leaves()
    first, second = (bound_to(Decoder(), values) for _ in range(2))
    other_order = bound_to(lambda v: Decoder()([v[1], v[2], v[0]]), [values[2], values[0], values[1]])
    packed = first.packed(values)
    assert second.packed(values) is packed
    assert other_order.packed([values[2], values[0], values[1]]) is packed


@pytest.mark.parametrize("decode", [swapped, rounded])
def test_bindings_that_read_the_same_tensors_in_two_ways_do_not(decode):
    values = leaves()
    values[2].fill_(0.3)
    plain, other = bound_to(Decoder(), values), bound_to(decode, values)
    for binding, expected in ((plain, Decoder()(values)), (other, decode(values)), (plain, Decoder()(values))):
        found = dequantize(binding.packed(values), torch.float32)
        assert torch.equal(found.to(expected.dtype), expected)


def test_a_copy_for_bfloat16_is_not_shared_with_a_binding_for_float16():
    dense = torch.randn(N, K)
    dense[:, : K // 2] *= 2.0**-60
    weight = quantize_mxfp4(dense)
    values = [weight.codes, weight.scales.view(torch.float8_e8m0fnu)]

    def decode(v) -> Tensor:
        codes = TABLE[torch.stack((v[0] & 15, v[0] >> 4), -1).flatten(-2).int()].unflatten(-1, (-1, 32))
        return (codes * v[1].float().unsqueeze(-1)).flatten(-2)

    wide, narrow = bound_to(decode, values), bound_to(decode, values, torch.float16)
    assert isinstance(wide.packed(values), PackedFP4) and isinstance(narrow.packed(values), Rejected)


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
    copy, other = weakref.ref(binding.packed(gone).words), weakref.ref(binding.packed(kept).words)
    binding.packed(gone)
    del gone[i]
    gc.collect()
    assert copy() is None and other() is not None
    assert binding.packed(kept).words is other()


def test_copies_die_with_the_binding(decoder):
    values = leaves()
    binding = Binding(decoder, recognise(Decoder()(values), values, "weight"), torch.bfloat16, "weight")
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


def test_leaves_that_hold_the_weight_in_another_way_are_recognised(binding, decoder):
    """As after compile time's weight was zeros, of which many recipes are true."""
    zeros = leaves()
    zeros[0].zero_()
    recipe = recognise(decoder(zeros), zeros, "weight")
    bound = Binding(decoder, recipe, torch.bfloat16, "weight")
    values = leaves()
    assert_holds(bound.packed(values), values)


@pytest.mark.parametrize(
    "spoil, reason",
    [
        (lambda codes, scales, factor: scales.view(torch.uint8).fill_(0x7F), "found NaN (byte 0x7f)"),
        (lambda codes, scales, factor: factor.fill_(torch.inf), "found inf"),
    ],
)
def test_leaves_that_hold_no_weight_are_rejected(binding, spoil, reason):
    values = leaves()
    spoil(*values)
    refused = binding.packed(values)
    assert isinstance(refused, Rejected) and reason in refused.reason


def test_a_value_that_is_not_the_decode_is_rejected():
    first = leaves()
    recipe = recognise(Decoder()(first), first, "weight")
    binding = Binding(lambda values: Decoder()(values) + 0.01, recipe, torch.bfloat16, "weight")
    assert isinstance(binding.packed(first), Rejected)


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
