"""The Triton kernels without a GPU, in float16: Triton's interpreter computes bfloat16 wrongly (triton issue 11584)."""

from itertools import product

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.decode.unpack import UNPACK_GAIN
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.layout import pack, tile_pairs
from marlin_w4a16.kernels.scale_bytes import scale_values
from narrow import matrix

GATE = 2.3e-4
FORMATS = list(product(["e4m3", "e8m0"], [16, 32]))


def contiguous(m: int, k: int) -> Tensor:
    return torch.randn(m, k).half()


def transposed(m: int, k: int) -> Tensor:
    return torch.randn(k, m).half().t()


def sliced(m: int, k: int) -> Tensor:
    return torch.randn(2 * m, 3 * k).half()[::2, k : 2 * k]


def assert_rounded_once(out: Tensor, x: Tensor, weight: FP4Weight, bias: Tensor | None) -> None:
    """Within the rounding of each output to float16 and that of the sums to float32; within the gate as a whole."""
    added = torch.zeros(weight.n).double() if bias is None else bias.double()
    exact = x.double() @ weight.decode().T + added
    magnitude = x.double().abs() @ weight.decode().abs().T + added.abs()
    assert (out.double() - exact).abs().le(2.0**-11 * exact.abs() + 1e-6 * magnitude).all()
    if out.numel() >= 3000:
        assert (out.double() - exact).norm() <= GATE * exact.norm()


LINEARS = [
    # m, n, k, x, bias, launch
    (1, 70, 160, contiguous, False, Launch(64, 16, 64, 1, 4, 3)),
    (1, 70, 160, transposed, True, Launch(64, 16, 128, 4, 4, 3)),
    (5, 70, 160, sliced, True, Launch(128, 16, 64, 1, 4, 3)),
    (5, 200, 672, contiguous, False, Launch(128, 16, 128, 4, 4, 3)),
    (17, 70, 160, transposed, False, Launch(64, 16, 128, 1, 4, 3)),
    (17, 200, 672, contiguous, True, Launch(64, 32, 128, 4, 4, 3)),
    (17, 200, 672, sliced, False, Launch(128, 16, 64, 1, 4, 3)),
    (33, 64, 32, transposed, True, Launch(64, 16, 64, 4, 4, 3)),
]


# half of the linears a format, with and without a split, in one and two rows of tiles
ROUNDED = matrix(lambda i, j: (i + i // 2 + j + j // 2) % 2 == 0, FORMATS, dict(enumerate(LINEARS)))


@pytest.mark.parametrize("form, linear", ROUNDED)
def test_the_fused_linear_rounds_once(form, linear, interpret, random_weight):
    m, n, k, make_x, with_bias, launch = linear
    weight, x = random_weight(n, k, *form), make_x(m, k)
    bias = torch.randn(2 * n).half()[::2] if with_bias else None
    (out,) = interpret(("fused", (x, pack(weight), bias, launch)))
    assert_rounded_once(out, x, weight, bias)


def test_the_decode_kernel_is_exact(interpret, random_weight, every_product):
    weights = [random_weight(n, k, *form) for form in FORMATS for n, k in ((70, 160), (1, 32), (128, 64))]
    weights += [every_product("e4m3", group) for group in (16, 32)]
    for weight, out in zip(weights, interpret(*(("decode", (pack(weight),)) for weight in weights)), strict=True):
        inside = out[: weight.n, : weight.k].double() * UNPACK_GAIN[weight.kind]
        assert torch.equal(inside.view(torch.int64), weight.unscaled(torch.float64).view(torch.int64))
        assert not out[weight.n :].any() and not out[:, weight.k :].any()


def test_the_epilogue_adds_parts_in_order_then_multiplier_then_bias(interpret, random_weight):
    packed = pack(random_weight(1500, 16))
    cases = [
        (torch.randn(parts, m, rows.stop - rows.start), bias, rows)
        for (parts, m, rows), bias in product(
            [(1, 1, slice(0, 1500)), (4, 3, slice(64, 134)), (3, 2, slice(70, 1500))],
            [None, torch.randn(1500).half(), torch.randn(3000)[::2]],
        )
    ]
    results = interpret(*(("epilogue", (parts, packed, bias, rows)) for parts, bias, rows in cases))
    for out, (parts, bias, rows) in zip(results, cases, strict=True):
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        total *= packed.multiplier[rows] * UNPACK_GAIN["e4m3"]
        expected = total if bias is None else total + bias[rows].float()
        assert torch.equal(out[:, rows], expected.half()) and out[:, : rows.start].isnan().all()
        assert out[:, rows.stop :].isnan().all()


@pytest.mark.parametrize("kind", ["e4m3", "e8m0"])
def test_unpacked_words_are_exact_for_every_byte_in_every_place_of_a_scale_word(kind, interpret):
    words = torch.randint(-(1 << 31), 1 << 31, (1 << 16, 2)).int()
    rows = torch.stack((torch.arange(1 << 16), torch.randperm(1 << 16)), -1)  # every pair of rows, in both groups
    byte = torch.stack((rows & 255, rows >> 8), -2).to(torch.uint8)  # word, r, group
    (found,) = interpret(("unpack", (words, byte.flatten(1).view(torch.int32).flatten(), kind)))  # word, group, p, r, h

    pairs = torch.stack(tile_pairs(words), -1).view(torch.bfloat16).view(-1, 2, 2, 2, 2)  # word, group, h, r, p
    codes = pairs.permute(0, 1, 4, 3, 2).double() * 2.0**126
    factors = scale_values(byte, kind).double().abs() / UNPACK_GAIN[kind]  # signs are in the codes
    if kind == "e8m0":
        factors[(byte < 104) | (byte > 140)] = torch.nan
        factors[byte == 0] = 0
    expected = codes * factors.mT[:, :, None, :, None]
    finite = expected.isfinite()
    assert torch.equal(found.view(torch.int16)[finite], expected.half().view(torch.int16)[finite])
    assert torch.equal(expected[finite], expected.half().double()[finite])
    if kind == "e8m0":
        assert found[~finite].isnan().all()
