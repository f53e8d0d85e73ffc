"""Tensors of a linear in FP8 become its weight and come back, bit for bit."""

from functools import partial

import pytest
import torch
from torch import Tensor

from checkpoints.headers import fields
from marlin_w4a16.checkpoints import fp8, modelopt
from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.fp8 import FP8Storage
from marlin_w4a16.checkpoints.storage import Part
from marlin_w4a16.kernels.fp4 import BLOCK_ELEMENTS, row_slices


def of_modelopt(algorithm: str) -> FP8Storage:
    return modelopt.scheme(fields({"quant_algo": algorithm})).storage("x")


FP8, IN_BLOCKS, MXFP8 = (of_modelopt(name) for name in ("FP8", "FP8_PB_WO", "MXFP8"))
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}
EVERY_CODE = torch.arange(256, dtype=torch.uint8).repeat(8, 1).view(torch.float8_e4m3fn)
FINITE = [byte & 0x7F != 0x7F for byte in range(256)]
PER_ROW = torch.tensor([1.0, 0.3, 0.0123, 1 / 3, 2**-5, 1.7, 0.9, 0.05])
SCALES = {
    "tensor": PER_ROW[1], "one": PER_ROW[1:2], "row": PER_ROW, "column": PER_ROW[:, None],
    "bfloat16": PER_ROW[:, None].bfloat16(), "float16": PER_ROW.half(),
}  # fmt: skip


def rounded(exact: Tensor, bits: int) -> Tensor:
    """To so many significant bits, to nearest even."""
    mantissa, exponent = exact.frexp()
    return torch.ldexp(torch.round(mantissa * 2**bits) / 2**bits, exponent)


@pytest.fixture(params=[BLOCK_ELEMENTS, 600, 1], ids=lambda n: f"blocks of {n}")
def blocks(request, monkeypatch):
    monkeypatch.setattr(fp8, "row_slices", partial(row_slices, elements=request.param))


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_fp8_decodes_and_comes_back(scale, dtype, blocks):
    scale = SCALES[scale]
    stored = {"weight": EVERY_CODE, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    weight = FP8.read(stored, dtype)
    exact = EVERY_CODE.double() * (scale.double().reshape(-1, 1) if scale.numel() > 1 else scale.double())
    assert weight.dtype == dtype and weight.isnan().sum() == 16
    if dtype != torch.float16:  # some are its subnormals
        assert torch.equal(weight[:, FINITE].double(), rounded(exact, BITS[dtype])[:, FINITE])
    kept = {leaf: stored[leaf] for leaf in ("weight_scale", "input_scale")}
    found = FP8.write(weight, kept, "x")
    assert found["weight"].dtype == torch.float8_e4m3fn and found["weight"].float()[:, 0x7F].isnan().all()
    assert torch.equal(found["weight"].view(torch.uint8)[:, FINITE], EVERY_CODE.view(torch.uint8)[:, FINITE])
    assert found["weight"].float()[:, 0xFF].isnan().all()
    assert found.keys() == stored.keys() and all(found[leaf] is kept[leaf] for leaf in kept)


def test_fp8_is_rounded_once():
    """A product that float32 rounds to a tie of bfloat16 is rounded by its exact value."""
    codes = torch.tensor([1.125, 1.375, 1.625, 1.875]).to(torch.float8_e4m3fn).repeat(64, 1)
    ties = 1 + (2 * torch.arange(64, dtype=torch.float64) + 1) / 256
    scale = (ties / codes[:, 0].double()).float()
    exact, twice = codes.double() * scale.double()[:, None], (codes.float() * scale[:, None]).bfloat16()
    found = FP8.read({"weight": codes, "weight_scale": scale}, torch.bfloat16)
    assert torch.equal(found.double(), rounded(exact, 8)) and not torch.equal(found, twice)
    written = FP8.write(found, {"weight_scale": scale}, "x")["weight"]
    assert torch.equal(written.view(torch.uint8), codes.view(torch.uint8))


def changed(at: tuple[int, int], value: float, scale: float) -> tuple[Tensor, Tensor]:
    weight = FP8.read({"weight": EVERY_CODE, "weight_scale": torch.tensor(scale)}, torch.float32)
    weight[at] = value
    return weight, torch.tensor(scale)


@pytest.mark.parametrize(
    "at, value, scale",
    [
        ((0, 0x38), 1 + 2**-23, 1.0),
        ((7, 0x01), 2**-10, 1.0),
        ((0, 0), 1e-30, 1.0),
        ((3, 0x38), 449.0, 1.0),
        ((3, 0x38), float("inf"), 1.0),
        ((0, 0x38), 7.0, 1e-3),  # 7000 is more than E4M3 holds
        ((0, 0x7F), 7.0, 1e-3),
    ],
)
def test_fp8_that_was_changed_is_not_written(at, value, scale, blocks):
    weight, scale = changed(at, value, scale)
    with pytest.raises(
        ValueError, match=r"^a\.b\.weight: found values that are no FP8 codes times their scales, "
    ) as e:
        FP8.write(weight, {"weight_scale": scale}, "a.b")
    assert "expected those loaded" in str(e.value) and "dequantize()" in str(e.value)


def test_fp8_that_was_changed_to_another_code_is_written():
    weight, scale = changed((0, 0x38), 448.0, 1.0)
    assert FP8.write(weight, {"weight_scale": scale}, "x")["weight"][0, 0x38].float() == 448


@pytest.mark.parametrize("scale", [1e-9, 2.8e-5, 147.0, 1e3])
def test_fp8_that_float16_cannot_hold_is_not_written(scale):
    scale = torch.tensor(scale)
    weight = FP8.read({"weight": EVERY_CODE, "weight_scale": scale}, torch.float16)
    with pytest.raises(
        ValueError, match=r"^a\.b\.weight: found torch\.float16, expected a dtype that holds every FP8 code"
    ):
        FP8.write(weight, {"weight_scale": scale}, "a.b")


@pytest.mark.parametrize("scale, dtype", [(3e-5, torch.float16), (146.0, torch.float16), (1e-9, torch.bfloat16)])
def test_fp8_at_the_ends_of_a_dtype(scale, dtype):
    stored = {"weight": EVERY_CODE[:, FINITE], "weight_scale": torch.tensor(scale)}
    found = FP8.write(FP8.read(stored, dtype), {"weight_scale": stored["weight_scale"]}, "x")["weight"]
    assert torch.equal(found.view(torch.uint8), stored["weight"].view(torch.uint8))


# Scales of blocks


def shape_of(made: FP8Storage, codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int, int] | None:
    return made.shape_of({"weight": Entry(None, "F8_E4M3", codes), "weight_scale": Entry(None, "F32", scales)})


@pytest.mark.parametrize(
    "made, codes, fitting, other",
    [
        (FP8, (4, 64), [(), (1,), (4,), (64,)], []),  # its scales are asked for by `fits`
        (FP8, (2, 4, 64), [], [(), (4,)]), (FP8, (64,), [], [(), (64,)]),
        (IN_BLOCKS, (256, 384), [(2, 3), (2, 1, 3, 1)], [(3, 2), (2, 4), (6,), (), (2, 3, 1), (256, 3), (2, 3, 1, 1)]),
        (IN_BLOCKS, (257, 100), [(3, 1)], [(2, 1), (3,), (2, 0)]), (IN_BLOCKS, (128,), [], [(1,), ()]),
        (MXFP8, (4, 64), [(4, 2)], [(4, 1), (1, 2), (4, 64), (8,), ()]), (MXFP8, (4, 65), [(4, 3)], [(4, 2)]),
    ],
)  # fmt: skip
def test_the_shape_of_a_linear(made, codes, fitting, other):
    assert all(shape_of(made, codes, scales) == (*codes, 0) for scales in fitting)
    assert not any(shape_of(made, codes, scales) for scales in other)


@pytest.mark.parametrize(
    "role, axes, fitting, other",
    [
        ("codes", ("n", "k"), [(4, 64)], [(64, 4), (1, 1), (4, 64, 1)]),
        ("scales", ("n",), [(), (1,), (1, 1), (4,), (4, 1)], [(1, 4), (64,), (0,), (4, 1, 1)]),
        ("input multiplier", (), [(), (1,)], [(4,), (4, 1), (0,)]),
    ],
)
def test_whether_a_shape_fits(role, axes, fitting, other):
    part, sizes = Part("leaf", role, ("F32",), axes), {"n": 4, "k": 64}
    assert all(FP8.fits(part, shape, sizes) for shape in fitting)
    assert not any(FP8.fits(part, shape, sizes) for shape in other)


def test_names_for_people():
    assert [made.format(0) for made in (FP8, IN_BLOCKS, MXFP8)] == [
        "FP8 E4M3", "FP8 E4M3 in blocks of 128 x 128", "MXFP8",
    ]  # fmt: skip
    assert [made.scales for made in (FP8, IN_BLOCKS, MXFP8)] == [
        "a scale for the weight or for each row", "[n / 128, k / 128]", "[n / 1, k / 32]",
    ]  # fmt: skip


def test_aliases_name_the_tensors_that_are_there():
    named = IN_BLOCKS.named({"weight", "weight_scale_inv"})
    assert (named.leaf("codes"), named.leaf("scales")) == ("weight", "weight_scale_inv")
    assert IN_BLOCKS.named({"weight", "weight_scale", "weight_scale_inv"}) is IN_BLOCKS


def codes_of(rows: int, columns: int) -> Tensor:
    """Every code but NaN, in turn."""
    every = torch.tensor([byte for byte in range(256) if FINITE[byte]], dtype=torch.uint8)
    return every[torch.arange(rows * columns).view(rows, columns) % len(every)].view(torch.float8_e4m3fn)


@pytest.mark.parametrize("rows, columns", [(256, 128), (300, 200), (1, 129), (130, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_for_each_block(rows, columns, dtype, blocks):
    scales = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    stored = {"weight": codes_of(rows, columns), "weight_scale": scales[:, None, :, None]}  # as ModelOpt has it
    assert torch.equal(IN_BLOCKS.read(stored, dtype), IN_BLOCKS.read({**stored, "weight_scale": scales}, dtype))
    wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    found = IN_BLOCKS.read(stored, dtype)
    assert torch.equal(found.double(), rounded(stored["weight"].double() * wide.double(), BITS[dtype]))
    again = IN_BLOCKS.write(found, {"weight_scale": stored["weight_scale"]}, "x")["weight"]
    assert torch.equal(again.view(torch.uint8), stored["weight"].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("columns", [64, 40])
def test_a_power_of_two_for_each_32_columns(columns, dtype, blocks):
    scales = torch.randint(117, 138, (8, -(-columns // 32)), dtype=torch.uint8)
    stored = {"weight": codes_of(8, columns), "weight_scale": scales.view(dtype)}
    factors = (scales.double() - 127).exp2().repeat_interleave(32, 1)[:, :columns]
    found = MXFP8.read(stored, torch.bfloat16)
    assert torch.equal(found.double(), stored["weight"].double() * factors)
    again = MXFP8.write(found, {"weight_scale": stored["weight_scale"]}, "x")["weight"]
    assert torch.equal(again.view(torch.uint8), stored["weight"].view(torch.uint8))


def test_a_block_that_was_changed_is_not_written():
    stored = {"weight": codes_of(130, 130), "weight_scale": torch.tensor([[1.0, 2.0], [4.0, 0.0]])}
    weight = IN_BLOCKS.read(stored, torch.float32)
    assert not weight[128:, 128:].any()
    weight[129, 129] = 1
    with pytest.raises(ValueError, match=r"^x\.weight: found values that are no FP8 codes times their scales"):
        IN_BLOCKS.write(weight, {"weight_scale": stored["weight_scale"]}, "x")
