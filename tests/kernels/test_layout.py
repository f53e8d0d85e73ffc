"""The packed layout: an exact inverse pair, and the order of bits that its module's docstring draws."""

from dataclasses import fields, replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_w4a16.kernels.fp4 import E2M1_VALUES, FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack, pack_into, packed_shapes, tile_pairs, untile_scales

FORMATS = list(product(["e4m3", "e8m0"], [16, 32]))
# Bits 15..0 of a half word: s sign, u m d the magnitude from its upper bit down, then the register 2 h + r.
FIELDS = ["s0", "s3", "d3", "s1", "u3", "m3", "s2", "u0", "m0", "d0", "u1", "m1", "d1", "u2", "m2", "d2"]
every_format = pytest.mark.parametrize("kind, group", FORMATS)


def equal(a: FP4Weight | PackedFP4, b: FP4Weight | PackedFP4) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def places() -> list[tuple[int, ...]]:
    """Of every bit of a tile: word, bit of the word, row, column, bit of the code."""
    found = []
    for at, (w, g, t, s) in enumerate(product(range(4), range(8), range(4), range(4))):
        for p, (bit, field) in product(range(2), zip(range(15, -1, -1), FIELDS, strict=True)):
            h, r = divmod(int(field[1]), 2)
            found.append((at, 16 * p + bit, 16 * w + 8 * r + g, 16 * s + 8 * h + 2 * t + p, "dmus".index(field[0])))
    return found


@st.composite
def shapes(draw) -> dict:
    kind, group = draw(st.sampled_from(FORMATS))
    lead = draw(st.sampled_from([(), (), (1,), (3,), (2, 2), (0,)]))
    n, k = draw(st.integers(0, 200)), group * draw(st.integers(0, 200 // group))
    return dict(lead=lead, n=n, k=k, kind=kind, group=group, seed=draw(st.integers(0, 2**32)))


def any_weight(lead: tuple[int, ...], n: int, k: int, kind: str, group: int, seed: int) -> FP4Weight:
    torch.manual_seed(seed)
    scales = torch.randint(255 if kind == "e8m0" else 127, (*lead, n, k // group), dtype=torch.uint8)
    if kind == "e4m3":
        scales += 0x80 * torch.randint(2, scales.shape, dtype=torch.uint8)
    codes = torch.randint(256, (*lead, n, k // 2), dtype=torch.uint8)
    return FP4Weight(codes, scales, torch.randn(*lead, n), kind, group)


@given(shapes())
@settings(max_examples=200, deadline=None)
def test_unpack_inverts_pack_bit_for_bit(shape):
    weight = any_weight(**shape)
    packed = pack(weight)
    assert equal(packed.unpack(), weight)
    assert (packed.n, packed.k, packed.kind, packed.group) == (weight.n, weight.k, weight.kind, weight.group)
    for tensor, expected in zip(
        (packed.words, packed.scales, packed.multiplier), packed_shapes(weight.n, weight.k, weight.group), strict=True
    ):
        assert tensor.shape == (*shape["lead"], *expected) and tensor.is_contiguous()


@every_format
def test_every_byte_survives_in_every_place(kind, group):
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    codes = (codes + torch.arange(256, dtype=torch.uint8).unsqueeze(1)).repeat(1, group // 16)
    bytes_ = torch.tensor([b for b in range(256) if b != 255 and (kind == "e8m0" or b != 127)], dtype=torch.uint8)
    scales = bytes_[(torch.arange(256)[:, None] + torch.arange(512 // 16)) % len(bytes_)]
    weight = FP4Weight(codes, scales, torch.randn(256), kind, group)
    assert equal(pack(weight).unpack(), weight)


def test_a_weight_of_many_blocks_comes_back(random_weight):
    weight = random_weight(1000, 2880, lead=(2,))
    assert equal(pack(weight).unpack(), weight) and pack(weight).unpack("up").name == "up"


def test_packing_what_is_packed_is_nothing(random_weight):
    packed = pack(random_weight(70, 96))
    assert pack(packed) is packed


def test_a_packed_weight_shares_no_memory_with_its_source(random_weight):
    weight = random_weight(64, 64)
    packed = pack(weight)
    ours = {t.untyped_storage().data_ptr() for t in (packed.words, packed.scales, packed.multiplier)}
    assert not ours & {t.untyped_storage().data_ptr() for t in (weight.codes, weight.scales, weight.multiplier)}
    assert packed.unpack().multiplier.data_ptr() != packed.multiplier.data_ptr()


def test_strided_codes_and_scales_pack_like_their_copies(random_weight):
    wide = random_weight(70, 192)
    strided = FP4Weight(wide.codes[::2, ::2], wide.scales[::2, ::2], wide.multiplier[::2], wide.kind, wide.group)
    copies = (t.contiguous() for t in (strided.codes, strided.scales, strided.multiplier))
    assert equal(pack(strided), pack(FP4Weight(*copies, wide.kind, wide.group)))


@every_format
def test_packing_over_a_packed_weight_keeps_its_addresses(kind, group, random_weight):
    first, second = (random_weight(70, 96, kind, group, seed=seed) for seed in (1, 2))
    packed = pack(first)
    before = [t.data_ptr() for t in (packed.words, packed.scales, packed.multiplier)]
    pack_into(second, packed)
    assert [t.data_ptr() for t in (packed.words, packed.scales, packed.multiplier)] == before
    assert equal(packed, pack(second))


@pytest.mark.parametrize(
    "other",
    [
        dict(n=71, k=96), dict(n=70, k=64), dict(n=70, k=96, kind="e8m0"), dict(n=70, k=96, group=32),
        dict(n=70, k=96, lead=(1,)),
    ],
    ids=str,
)  # fmt: skip
def test_packing_over_another_shape_or_format_is_refused_and_changes_nothing(other, random_weight):
    weight = random_weight(70, 96)
    packed = pack(weight)
    with pytest.raises(ValueError, match=r"^down: .*another shape or format"):
        pack_into(replace(random_weight(**other), name="down"), packed)
    assert equal(packed.unpack(), weight)


@every_format
@pytest.mark.parametrize("n, k", [(1, 32), (63, 32), (65, 96), (70, 160), (64, 96)])
def test_padding_is_zero_codes_with_scale_one(n, k, kind, group, random_weight):
    packed = pack(random_weight(n, k, kind, group))
    rows, columns = (64 * tiles for tiles in packed.words.shape[:2])
    whole = PackedFP4(packed.words, packed.scales, torch.ones(rows), rows, columns, kind, group).unpack()
    outside = torch.ones(rows, columns, dtype=torch.bool)
    outside[:n, :k] = False
    assert outside.any() and not whole.codes[outside[:, ::2]].any()
    assert (whole.scales[outside[:, ::group]] == {"e4m3": 0x38, "e8m0": 127}[kind]).all()


@every_format
@given(cut=st.tuples(*[st.integers(0, 4)] * 4))
def test_packing_a_slice_is_slicing_the_packed(kind, group, cut, random_weight):
    weight = random_weight(250, 224, kind, group)
    packed = pack(weight)
    (top, bottom), (left, right) = sorted(cut[:2]), sorted(cut[2:])
    rows, columns = slice(64 * top, 64 * bottom), slice(64 * left, 64 * right)
    part = FP4Weight(
        weight.codes[rows, columns.start // 2 : columns.stop // 2],
        weight.scales[rows, columns.start // group : columns.stop // group], weight.multiplier[rows], kind, group,
    )  # fmt: skip
    tiles = (slice(top, bottom), slice(left, right))
    sliced = PackedFP4(packed.words[tiles], packed.scales[tiles], packed.multiplier[rows], part.n, part.k, kind, group)
    assert equal(pack(part), sliced) and equal(sliced.unpack(), part)
    straight = sliced.contiguous()
    assert equal(straight, sliced) and straight.contiguous() is straight
    assert all(t.is_contiguous() for t in (straight.words, straight.scales, straight.multiplier))


@every_format
def test_words_hold_the_bits_where_the_docstring_draws_them(kind, group, random_weight):
    weight = random_weight(64, 64, kind, group)
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(1)
    if kind == "e4m3":  # the sign of a scale is in its codes
        codes ^= (weight.scales >> 7 << 3).repeat_interleave(group, 1)
    codes, words = codes.tolist(), [0] * 512
    for at, bit, row, column, code_bit in places():
        words[at] |= (codes[row][column] >> code_bit & 1) << bit
    assert [word & 0xFFFFFFFF for word in pack(weight).words.flatten().tolist()] == words


@every_format
def test_scale_bytes_lie_where_the_docstring_says(kind, group, random_weight):
    weight = random_weight(64, 64, kind, group)
    order = product(range(4), range(8), range(32 // group), range(2), range(2))
    expected = [int(weight.scales[16 * w + 8 * r + g, 2 * pair + odd]) for w, g, pair, r, odd in order]
    assert pack(weight).scales.flatten().tolist() == expected


@pytest.mark.parametrize("group", [16, 32])
def test_only_the_sign_of_a_negative_e4m3_scale_moves_into_the_words(group, every_product):
    weight = every_product("e4m3", group)
    negative = weight.scales >> 7
    positive = replace(
        weight, codes=weight.codes ^ (0x88 * negative).repeat_interleave(group // 2, 1), scales=weight.scales & 0x7F
    )
    packed, folded = pack(weight), pack(positive)
    assert torch.equal(packed.words, folded.words) and torch.equal(packed.scales & 0x7F, folded.scales)
    assert torch.equal(untile_scales(packed.scales, group)[: weight.n], weight.scales)


def test_tile_pairs_are_values_times_2_to_the_minus_126_in_bfloat16(random_weight):
    words = pack(random_weight(64, 64)).words
    codes = torch.zeros(512, 4, 2, dtype=torch.int64)  # word, register, half
    for at, bit, row, column, code_bit in places():
        register = 2 * (column // 8 % 2) + row // 8 % 2
        codes[at, register, column % 2] |= (int(words.flatten()[at]) >> bit & 1) << code_bit
    expected = (torch.tensor(E2M1_VALUES, dtype=torch.float64) * 2.0**-126).to(torch.bfloat16)[codes]
    pairs = torch.stack(tile_pairs(words), -1).view(torch.int16).view(512, 4, 2)
    assert torch.equal(pairs, expected.view(torch.int16))


@given(n=st.integers(0, 300), groups=st.integers(0, 20), lead=st.sampled_from([(), (3,)]))
def test_bytes_are_those_of_the_tensors(n, groups, lead):
    packed = pack(any_weight(lead, n, groups * 16, "e4m3", 16, 0))
    tiles = len(range(0, n, 64)) * len(range(0, groups, 4))
    assert packed.nbytes == (tiles * (2048 + 256) + n * 4) * (lead[0] if lead else 1)
