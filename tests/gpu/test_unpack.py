"""The PTX form of the decode step, bit for bit that of the interpreter and of torch, for every scale byte."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN, scale_pairs, unpack_words  # noqa: E402
from marlin_w4a16.kernels.layout import tile_pairs  # noqa: E402
from marlin_w4a16.kernels.scale_bytes import scale_values  # noqa: E402

pytestmark = pytest.mark.gpu

SIZE = 65536 * 16


@triton.jit
def _unpack(words, scales, out, kind: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = scale_pairs(tl.load(scales + at), kind, dtype, PTX)
    words_of_groups = tl.load(words + at[:, None] * 2 + tl.arange(0, 2)[None, :])
    values = unpack_words(words_of_groups, pairs, kind, dtype, PTX).reshape(BLOCK, 16)
    tl.store(out + at[:, None] * 16 + tl.arange(0, 16)[None, :], values)


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_byte_in_every_place_of_a_scale_word_with_random_words(kind, dtype):
    words = torch.randint(-(2**31), 2**31, (SIZE, 2), device="cuda").int()
    # every pair of rows, in both groups
    rows = torch.stack((torch.arange(SIZE, device="cuda"), torch.randperm(SIZE, device="cuda")), -1) & 0xFFFF
    byte = torch.stack((rows & 255, rows >> 8), -2).to(torch.uint8)  # word, r, group
    scales = byte.flatten(1).view(torch.int32).flatten()
    ptx, plain = (torch.full((SIZE, 2, 2, 2, 2), torch.nan, device="cuda", dtype=dtype) for _ in range(2))
    name = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    for out, use_ptx in ((ptx, True), (plain, False)):  # word, group, p, r, h
        _unpack[(SIZE // 1024,)](words, scales, out, kind, name, use_ptx, 1024)

    codes = torch.stack(tile_pairs(words), -1).view(torch.bfloat16).view(SIZE, 2, 2, 2, 2)  # word, group, h, r, p
    factors = scale_values(byte, kind).double().abs() / UNPACK_GAIN[kind]  # signs are in the codes
    if (kind, dtype) == ("e8m0", torch.float16):
        factors[(byte < 104) | (byte > 140)] = torch.nan
        factors[byte == 0] = 0
    factors = factors.mT[:, :, None, :, None].expand(ptx.shape)
    exact = codes.permute(0, 1, 4, 3, 2).double() * 2.0**126 * factors
    fits = factors.isfinite() & (exact.abs() <= torch.finfo(dtype).max)
    assert torch.equal(exact[fits], exact.to(dtype)[fits].double())
    assert torch.equal(ptx[fits].view(torch.int16), exact.to(dtype)[fits].view(torch.int16))
    assert torch.equal(ptx[fits].view(torch.int16), plain[fits].view(torch.int16))
    if (kind, dtype) == ("e8m0", torch.float16):
        assert ptx[~fits].isnan().all() and plain[~fits].isnan().all()
    elif kind == "e8m0":
        assert not ptx[~fits].isfinite().any(), "6 * 2**126 is infinite"
    else:
        assert torch.equal(ptx.view(torch.int16), plain.view(torch.int16)), "0x7F is 480 to both"
