"""The PTX form of the decode step, bit for bit that of the interpreter and of torch, for every scale byte."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from marlin_w4a16.kernels.dequantize import scale_values  # noqa: E402
from marlin_w4a16.kernels.layout import tile_pairs  # noqa: E402
from marlin_w4a16.kernels.unpack import UNPACK_GAIN, unpack_words  # noqa: E402

pytestmark = pytest.mark.gpu

SIZE = 65536 * 16


@triton.jit
def _unpack(words, scales, out, kind: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = unpack_words(tl.load(words + at), tl.load(scales + at), kind, dtype, PTX).reshape(BLOCK, 8)
    tl.store(out + at[:, None] * 8 + tl.arange(0, 8)[None, :], values)


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_scale_pairs_with_random_words(kind, dtype):
    words = torch.randint(-(2**31), 2**31 - 1, (SIZE,), device="cuda", dtype=torch.int32)
    pairs = torch.arange(65536, device="cuda", dtype=torch.int32).repeat(SIZE // 65536)
    bytes_ = torch.stack((pairs & 255, pairs >> 8), -1).to(torch.uint8)
    ptx, plain = (torch.full((SIZE, 8), torch.nan, device="cuda", dtype=dtype) for _ in range(2))
    name = tl.bfloat16 if dtype == torch.bfloat16 else tl.float16
    for out, use_ptx in ((ptx, True), (plain, False)):
        _unpack[(SIZE // 1024,)](words, pairs, out, kind, name, use_ptx, 1024)

    codes = torch.stack(tile_pairs(words), -1).view(torch.bfloat16).view(SIZE, 2, 2, 2).double() * 2.0**126  # h r p
    scales = scale_values(bytes_, kind).double()[:, None, :, None]
    exact = (codes * scales / UNPACK_GAIN[kind]).permute(0, 3, 2, 1).reshape(SIZE, 8)  # p r h

    if kind == "e4m3":
        fits = ((bytes_ & 0x7F) != 0x7F).all(-1)
    elif dtype == torch.float16:
        fits = ((bytes_ >= 104) & (bytes_ <= 140)).all(-1)
        outside = (bytes_ < 104) | (bytes_ > 140)
        by_row = ptx.view(SIZE, 2, 2, 2).isnan().all(-1).all(1)  # p r h
        assert torch.equal(by_row, outside)
    else:
        fits = (bytes_ <= 252).all(-1)
    assert torch.equal(ptx[fits].double(), exact[fits])
    assert torch.equal(ptx[fits].view(torch.int16), plain[fits].view(torch.int16))
