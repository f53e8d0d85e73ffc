"""Tensors of a linear in FP4 become its weight and come back, bit for bit."""

import pytest
import torch
from torch import Tensor

from checkpoints.headers import fields
from marlin_w4a16.checkpoints import compressed_tensors, deepseek, gpt_oss, modelopt
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.fp8 import Storage
from marlin_w4a16.checkpoints.storage import DTYPES, FP4Storage, Part
from marlin_w4a16.kernels.scale_bytes import scale_bytes as bytes_of_floats

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def of_modelopt(algorithm: str, group: int | None = None) -> Storage:
    return modelopt.scheme(fields({"quant_algo": algorithm, "group_size": group})).storage("x")


def of_compressed(name: str, group: int) -> Storage:
    weights = {"num_bits": 4, "type": "float", "group_size": group}
    groups = {"group_0": {"format": name, "targets": ["Linear"], "weights": weights}}
    return compressed_tensors.scheme(fields({"config_groups": groups})).storage("x")


FP4: dict[str, tuple[FP4Storage, int]] = {
    "modelopt-nvfp4": (of_modelopt("NVFP4", 16), 16), "modelopt-group32": (of_modelopt("W4A16_NVFP4", 32), 32),
    "modelopt-awq-32": (of_modelopt("NVFP4_AWQ"), 32), "modelopt-mxfp4": (of_modelopt("mxfp4"), 32),
    "ct-nvfp4": (of_compressed("nvfp4-pack-quantized", 16), 16),
    "ct-mxfp4": (of_compressed("mxfp4-pack-quantized", 32), 32), "gpt-oss": (gpt_oss.EXPERTS, 32),
    "deepseek": (deepseek.EXPERTS, 32),
}  # fmt: skip


def scale_value(kind: str, byte: int) -> float:
    """A scale by its bits."""
    if kind == "e8m0":
        return 2.0 ** (byte - 127)
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, byte >> 3 & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def scale_bytes(kind: str) -> list[int]:
    """All that are no NaN: zeros, subnormals and negative ones among them."""
    return [byte for byte in range(256) if (byte != 255 if kind == "e8m0" else byte & 0x7F != 0x7F)]


def encoded(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """E8M0 or E4M3 bytes in a dtype; float32 holds the powers of two that E8M0 bytes are."""
    if dtype != torch.float32:
        return scales.view(dtype)
    return scales.double().apply_(lambda byte: scale_value("e8m0", int(byte))).float()


def entries_of(stored: dict[str, Tensor]) -> dict[str, Entry]:
    """What a file tells of tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {leaf: Entry(None, names[t.dtype], tuple(t.shape)) for leaf, t in stored.items()}


def tensors(made: FP4Storage, group: int, scale_dtype: torch.dtype, one: tuple[int, ...]) -> dict[str, Tensor]:
    """Random codes, every scale, and factors of shape ``[]`` or ``[1]``."""
    scales = torch.tensor(scale_bytes(made.kind), dtype=torch.uint8)
    scales = torch.cat((scales, scales[len(scales) - 256 :])).view(16, 16)
    blocks = (16, 16, group // 2) if made.stacked else (16, 8 * group)
    columns, found = {"codes": blocks, "pre-quant scale": (16 * group,)}, {}
    for part in made.parts:
        shape = columns.get(part.role, one)
        if part.role == "codes":
            found[part.leaf] = torch.randint(256, shape, dtype=torch.uint8).view(DTYPES[part.dtypes[0]])
        else:
            found[part.leaf] = torch.rand(shape).to(DTYPES[part.dtypes[-1]])
    return {**found, made.leaf("scales"): encoded(scales, scale_dtype)}


def beside(made: FP4Storage, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a packed weight does not hold."""
    return {leaf: t for leaf, t in stored.items() if leaf not in (made.leaf("codes"), made.leaf("scales"))}


CASES = [(name, DTYPES[dtype]) for name, (made, _) in FP4.items() for dtype in made.part("scales").dtypes]


@pytest.mark.parametrize("one", [(), (1,)], ids=str)
@pytest.mark.parametrize("name, scale_dtype", CASES, ids=str)
def test_fp4_decodes_exactly_and_comes_back(name, scale_dtype, one):
    made, group = FP4[name]
    stored = tensors(made, group, scale_dtype, one)
    weight = made.read(stored, "some.linear")
    assert (weight.kind, weight.group, weight.name) == (made.kind, group, "some.linear")
    codes = stored[made.leaf("codes")].view(torch.uint8).flatten(1)
    values = E2M1[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    bytes_ = tensors(made, group, DTYPES[made.part("scales").dtypes[0]], one)[made.leaf("scales")].view(torch.uint8)
    scales = bytes_.double().apply_(lambda byte: scale_value(made.kind, int(byte)))
    factor = torch.ones(())
    if (part := made.part("multiplier", "divisor")) is not None:
        factor = stored[part.leaf].float()
        factor = 1 / factor if part.role == "divisor" else factor
        assert part.role == ("multiplier" if name.startswith("modelopt") else "divisor")
    assert torch.equal(weight.decode(), values * scales.repeat_interleave(group, -1) * factor.double())
    assert_same(made.write(weight, {**beside(made, stored), "bias": torch.zeros(16)}, entries_of(stored)), stored)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In the order of the parts, bit for bit."""
    assert list(found) == list(expected)
    for leaf, tensor in expected.items():
        assert (found[leaf].dtype, found[leaf].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[leaf].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensors_that_may_be_missing_may_be_missing():
    made, group = FP4["modelopt-nvfp4"]
    stored = tensors(made, group, torch.float8_e4m3fn, ())
    del stored["input_scale"], stored["pre_quant_scale"]
    weight = made.read(stored, "x")
    assert_same(made.write(weight, {"weight_scale_2": stored["weight_scale_2"]}, entries_of(stored)), stored)


@pytest.mark.parametrize("name, scale_dtype", CASES, ids=str)
def test_what_was_packed_is_restored(name, scale_dtype):
    """Rows whose scales packing changed come back from what they were."""
    made, group = FP4[name]
    stored = tensors(made, group, scale_dtype, (1,))
    weight = made.read(stored, "x")
    fitted = weight.fit_first(torch.float16, torch.bfloat16)
    rows = (fitted.scales != weight.scales).any(-1).nonzero()[:, 0]
    unfitted = (rows, weight.scales[rows]) if len(rows) else None
    assert (unfitted is None) == (made.kind == "e4m3")
    kept = beside(made, stored)
    assert_same(made.restore(fitted, unfitted, kept, entries_of(stored), "x"), stored)
    other = fitted.derived(fitted.codes, fitted.scales, fitted.multiplier * 2)
    with pytest.raises(CheckpointError, match=r"^x: found another weight than the checkpoint's"):
        made.restore(other, unfitted, kept, entries_of(stored), "x")


def test_aliases_name_the_tensors_that_are_there():
    made = deepseek.EXPERTS
    for leaf in ("weight_scale", "weight_scale_inv"):
        named = made.named({"weight", leaf})
        assert (named.leaf("codes"), named.leaf("scales")) == ("weight", leaf)
        assert named.named({"weight", "scale"}) == named  # it has no other names
    assert made.named({"weight", "scale", "weight_scale"}) is made.named({"weight"}) is made


def test_the_bytes_of_powers_of_two():
    every = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(bytes_of_floats(encoded(every, torch.float32), "e8m0"), every)
    odd = torch.tensor([0.0, -1.0, 3.0, 1 + 2**-23, 2.0**-128, torch.inf, -torch.inf, torch.nan])
    assert bytes_of_floats(odd, "e8m0").tolist() == [255] * len(odd)


def shapes(codes: tuple[int, ...], scales: tuple[int, ...], prefix: str = "weight") -> dict[str, Entry]:
    return {prefix: Entry(None, "U8", codes), "weight_scale": Entry(None, "F8_E4M3", scales)}


@pytest.mark.parametrize(
    "codes, scales, expected",
    [
        ((8, 4, 2, 16), (8, 4, 2), (4, 64, 32)),
        ((8, 4, 64), (8, 4, 4), (4, 128, 32)),  # its other axes are asked for by `fits`
        ((8, 4, 2, 8), (8, 4, 2), None),
        ((8, 4, 2, 16), (8, 4, 4), None),
        ((8, 4, 2, 16), (8, 4), None),
        ((8, 4, 2, 16), (8, 4, 2, 1), None),
        ((8,), (8, 4, 2), None),
        ((), (), None),
    ],
)
def test_the_shape_of_a_stack(codes, scales, expected):
    made = {"blocks": Entry(None, "U8", codes), "scales": Entry(None, "U8", scales)}
    assert gpt_oss.EXPERTS.shape_of(made) == expected


@pytest.mark.parametrize(
    "name, codes, scales, expected",
    [
        ("modelopt-nvfp4", (4, 32), (4, 4), (4, 64, 16)),
        ("modelopt-nvfp4", (4, 32), (4, 2), None),  # groups of 32, the config says 16
        ("modelopt-awq-32", (4, 32), (4, 4), (4, 64, 16)),  # the config does not say
        ("modelopt-awq-32", (4, 32), (4, 2), (4, 64, 32)),
        ("modelopt-awq-32", (4, 32), (4, 1), None),
        ("modelopt-awq-32", (4, 32), (4, 8), None),
        ("modelopt-mxfp4", (4, 32), (4, 2), (4, 64, 32)),
        ("modelopt-mxfp4", (4, 32), (4, 4), None),
        ("modelopt-nvfp4", (4, 32), (4, 3), None),
        ("modelopt-nvfp4", (4, 32), (4, 0), None),
        ("modelopt-nvfp4", (4, 0), (4, 4), None),
        ("modelopt-nvfp4", (4, 32), (4,), None),
        ("modelopt-nvfp4", (4, 32), (16, 1, 1), None),
        ("modelopt-nvfp4", (128,), (4, 4), None),
    ],
)
def test_the_shape_of_a_linear(name, codes, scales, expected):
    assert FP4[name][0].shape_of(shapes(codes, scales)) == expected


AXES = {"e": 8, "n": 4, "k": 64, "k/2": 32, "k/g": 4, "g/2": 8}
MATRIX, COLUMN, ONE = ("n", "k/2"), ("k",), ()
BLOCKS = ("e", "n", "k/g", "g/2")


@pytest.mark.parametrize(
    "made, role, axes, fitting, other",
    [
        (FP4["modelopt-nvfp4"][0], "codes", MATRIX, [(4, 32)], [(4, 64), (32, 4), (4,), (), (1,)]),
        (FP4["modelopt-nvfp4"][0], "pre-quant scale", COLUMN, [(64,)], [(4,), (1,), (), (1, 64)]),
        (FP4["modelopt-nvfp4"][0], "multiplier", ONE, [(), (1,), (1, 1)], [(4,), (0,), (2,)]),
        (gpt_oss.EXPERTS, "codes", BLOCKS, [(8, 4, 4, 8)], [(8, 4, 32), (4, 4, 8), (4, 8, 4, 8)]),
        (of_modelopt("NVFP4_SVD", 16), "low rank a", ("r", "k"), [(8, 64), (1, 64)], [(64, 8), (64,), (8, 64, 1)]),
        (of_modelopt("NVFP4_SVD", 16), "low rank b", ("n", "r"), [(4, 8), (4, 1)], [(8, 4), (4,), (3, 8)]),
    ],
)
def test_whether_a_shape_fits(made, role, axes, fitting, other):
    part = Part("leaf", role, ("F32",), axes)
    assert all(made.fits(part, shape, AXES) for shape in fitting)
    assert not any(made.fits(part, shape, AXES) for shape in other)


def test_names_for_people():
    assert FP4["modelopt-awq-32"][0].scales == "[n, k / 16 or 32]"
    assert [made.format(group) for made, group in FP4.values()] == [
        "NVFP4 group 16", "FP4 e4m3 group 32", "FP4 e4m3 group 32", "MXFP4 group 32", "NVFP4 group 16",
        "MXFP4 group 32", "MXFP4 group 32", "MXFP4 group 32",
    ]  # fmt: skip
    assert gpt_oss.EXPERTS.scales == "[experts, n, k / 32]"
    assert FP4["modelopt-awq-32"][0].of_stack().scales == "[experts, k / 16 or 32, n]"
    with pytest.raises(KeyError, match="multiplier"):
        FP4["modelopt-mxfp4"][0].leaf("multiplier", "divisor")
