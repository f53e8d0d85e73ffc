"""The kernel that packs, against plain torch on the CPU, bit for bit; what it launches, and the memory it takes."""

from itertools import product

import pytest
import torch

from marlin_w4a16.kernels.expert_order import ORDERS, packed_rows
from marlin_w4a16.kernels.experts import pack_experts, pack_first
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import empty_packed, pack, pack_into

pytestmark = pytest.mark.gpu
FORMATS = list(product(["e4m3", "e8m0"], [16, 32]))
every_format = pytest.mark.parametrize("kind, group", FORMATS)


def draw(n: int, k: int, kind: str, group: int, *lead: int) -> FP4Weight:
    """Any codes, and every scale byte, NaN too: nothing is computed with them here."""
    codes, scales = (torch.randint(256, (*lead, n, k // part), dtype=torch.uint8) for part in (2, group))
    return FP4Weight.unchecked(codes, scales, torch.randn(*lead, n), kind, group)


def on_the_gpu(weight: FP4Weight) -> FP4Weight:
    return weight.derived(weight.codes.cuda(), weight.scales.cuda(), weight.multiplier.cuda())


def assert_same(found, expected):
    assert all(f.is_cuda and torch.equal(f.cpu(), e) for f, e in zip(found.tensors, expected.tensors, strict=True))


@every_format
@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)])
def test_any_shape(kind, group, lead):
    for n, k in ((1, 32), (63, 96), (64, 64), (70, 160), (1000, 2880), (0, 64), (5, 0)):
        weight = draw(n, k, kind, group, *lead)
        assert_same(pack(on_the_gpu(weight)), pack(weight))


@every_format
@pytest.mark.parametrize("order", [None, *ORDERS])
def test_experts_in_every_order(kind, group, order):
    for intermediate, width in ((64, 64), (100, 128), (1, 32), (704, 768)):
        w13 = draw(intermediate * (1 if order is None else 2), 160, kind, group, 5)
        w2 = draw(70, width, kind, group, 5)
        found = pack_experts(on_the_gpu(w13), on_the_gpu(w2), order)
        for one, other in zip(found, pack_experts(w13, w2, order), strict=True):
            assert_same(one, other)


def test_strided_codes_and_scales():
    wide = on_the_gpu(draw(70, 192, "e4m3", 16, 4))
    parts = [wide.codes[::2, ::2, ::2], wide.scales[::2, ::2, ::2], wide.multiplier[::2, ::2]]
    turned = [wide.codes.mT.contiguous().mT, wide.scales.mT.contiguous().mT, wide.multiplier]
    for some in (parts, turned):
        assert_same(pack(wide.derived(*some)), pack(wide.derived(*(t.cpu().contiguous() for t in some))))


def test_over_a_stack_that_stays_where_it_is():
    first, second = (draw(96, 160, "e4m3", 16, 4) for _ in range(2))
    packed = pack_first([on_the_gpu(first)], 4, 64, "gate_up")
    before, versions = [t.data_ptr() for t in packed.tensors], [t._version for t in packed.tensors]
    parts = on_the_gpu(second)
    halves = (
        parts.derived(*(t[at] for t in (parts.codes, parts.scales, parts.multiplier))) for at in (slice(1), slice(1, 4))
    )
    assert pack_first(halves, 4, 64, "gate_up", packed) is packed
    assert [t.data_ptr() for t in packed.tensors] == before
    assert all(t._version > version for t, version in zip(packed.tensors, versions, strict=True))
    assert_same(packed, pack_first([second], 4, 64, "gate_up"))


def test_a_stack_beyond_two_to_the_31_bytes():
    weight = FP4Weight.unchecked(
        torch.randint(256, (9, 16384, 16384), dtype=torch.uint8, device="cuda"),
        torch.randint(256, (9, 16384, 2048), dtype=torch.uint8, device="cuda"),
        torch.ones(9, 16384, device="cuda"), "e4m3", 16,
    )  # fmt: skip
    packed = pack(weight)
    some = slice(16320, None)
    last = weight.derived(weight.codes[8, some], weight.scales[8, some], weight.multiplier[8, some])
    expected = pack(last.derived(last.codes.cpu(), last.scales.cpu(), last.multiplier.cpu()))
    assert torch.equal(packed.words[8, -1].cpu(), expected.words[0])
    assert torch.equal(packed.scales[8, -1].cpu(), expected.scales[0])


def test_one_launch_writes_codes_and_the_last_writes_the_multiplier():
    """A kernel that is launched after packing may read codes before the one before it ends."""
    weight, rows = on_the_gpu(draw(96, 160, "e4m3", 16, 4)), packed_rows(48, 64, "gate_up").cuda()
    packed = empty_packed(weight, len(rows))
    pack_into(weight, packed, rows)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pack_into(weight, packed, rows)
        torch.cuda.synchronize()
    kernels = sorted((e for e in profile.events() if e.device_type.name == "CUDA"), key=lambda e: e.time_range.start)
    assert [i for i, kernel in enumerate(kernels) if "_pack_kernel" in kernel.name] == [len(kernels) - 2]
    assert len(kernels) <= 8


@pytest.mark.parametrize("order", [None, "gate_up"])
def test_memory_beyond_what_is_packed(order):
    weight = on_the_gpu(draw(4096, 4096, "e4m3", 16, 32))
    intermediate = 4096 if order is None else 2048
    packed = pack_first([weight], 32, intermediate, order)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    pack_first([weight], 32, intermediate, order, packed)
    assert torch.cuda.max_memory_allocated() - start <= 16 << 20
