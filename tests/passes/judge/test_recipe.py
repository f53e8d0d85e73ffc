"""How codes, scales and factors stand in the tensors of a graph, and the weight that is read from them."""

from functools import partial

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import E2M1_VALUES, FP4Weight, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.kernels.fp4 import block_rows
from marlin_w4a16.passes.judge.decode import Window
from marlin_w4a16.passes.judge.recipe import (
    CODINGS,
    SCALINGS,
    Factor,
    FromSources,
    FromValue,
    Joined,
    OfType,
    Source,
)
from weights import equal

N, K = 48, 64
CODES = torch.arange(256, dtype=torch.uint8).view(8, 32)  # every byte


def nibbles(codes: Tensor) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), -1).flatten(-2)


def elements(codes: Tensor) -> Tensor:
    return torch.tensor(E2M1_VALUES)[nibbles(codes).int()]


def by_groups(values: Tensor, scales: Tensor) -> Tensor:
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def plain(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    return by_groups(elements(codes), scales.float()) * factor  # rounded once


def checkpoint(n: int = N) -> tuple[FP4Weight, list[Tensor]]:
    """A weight, and its codes, scales and factor as `plain` takes them."""
    weight = quantize_nvfp4(torch.randn(n, K))
    return weight, [weight.codes, weight.scales.view(torch.float8_e4m3fn), weight.multiplier[:1].clone()]


def leaf(decode, index: int) -> int:
    return decode.nodes.index(decode.leaves[index])


def sources(decode, **choices) -> FromSources:
    """The recipe of `plain`."""
    first = {
        "codes": Source(leaf(decode, 0), "low nibble first"), "scales": Source(leaf(decode, 1), "e4m3 bytes"),
        "factor": Factor(leaf(decode, 2)), "window": Window(0, decode.rows), "group": 16,
    }  # fmt: skip
    return FromSources(**first | choices)


CODED = {
    "low nibble first": [CODES, CODES.view(torch.int8), CODES.view(torch.float4_e2m1fn_x2)],
    "high nibble first": [(CODES << 4) | (CODES >> 4), ((CODES << 4) | (CODES >> 4)).view(torch.int8)],
    "a number each": [nibbles(CODES).to(t) for t in (torch.uint8, torch.int32, torch.int64, torch.float32)],
    "a value each": [elements(CODES).to(t) for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)],
}


@pytest.mark.parametrize(
    "coding, value", [(name, value) for name, values in CODED.items() for value in values], ids=str
)
def test_a_coding_gives_the_bytes(coding, value):
    per_column, read = CODINGS[coding]
    assert value.shape[-1] * per_column == 64
    found = read(value)
    assert found.dtype == torch.uint8 and torch.equal(found, CODES)


def test_each_coding_is_tested():
    assert CODED.keys() == CODINGS.keys()


@pytest.mark.parametrize(
    "coding, value",
    [
        ("a number each", 16), ("a number each", 256), ("a number each", -1), ("a number each", 0.5),
        ("a value each", 2.5), ("a value each", 7.0), ("a value each", -5.0), ("a value each", 0.25),
        ("a value each", 8.0), ("a value each", torch.nan), ("a value each", torch.inf),
    ],
)  # fmt: skip
def test_what_is_no_code_is_refused(coding, value):
    values = torch.ones(2, 4, dtype=torch.float32 if isinstance(value, float) else torch.int64)
    values[1, 2] = value
    with pytest.raises(ValueError, match="not codes" if coding == "a number each" else "not values of E2M1"):
        CODINGS[coding][1](values)


def test_scalings():
    scales = torch.randint(1, 0x7E, (4, 8), dtype=torch.uint8)
    values = {
        "e4m3 bytes": [scales, scales.view(torch.int8), scales.view(torch.float8_e4m3fn)],
        "e8m0 bytes": [scales, scales.view(torch.int8), scales.view(torch.float8_e8m0fnu)],
        "e4m3 floats": [scales.view(torch.float8_e4m3fn).float()],
        "e8m0 floats": [torch.exp2(scales.double() - 127)],
    }
    assert values.keys() == SCALINGS.keys()
    for coding, each in values.items():
        kind, read = SCALINGS[coding]
        assert kind == coding[:4]
        for value in each:
            byte, factor = read(value)
            assert torch.equal(byte, scales) and byte.dtype == torch.uint8 and factor is None
    _, factor = SCALINGS["e4m3 floats"][1](scales.view(torch.float8_e4m3fn).float() * 0.37)
    assert factor.shape == (4,)


def test_where_the_rows_of_a_source_lie():
    value = torch.arange(6 * 4)
    rows = Source(0, "e4m3 bytes").matrix(value, 6, 4)
    columns = Source(0, "e4m3 bytes", 1).matrix(value.view(4, 6), 6, 4)
    blocks = Source(0, "e4m3 bytes", 2).matrix(value.view(2, 4, 3), 6, 4)
    assert torch.equal(rows, value.view(6, 4)) and torch.equal(columns, value.view(4, 6).T)
    assert torch.equal(blocks, torch.cat([part.T for part in value.view(2, 4, 3)]))


@pytest.mark.parametrize("dtype", [torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, torch.int8], ids=str)
def test_one_byte_elements_are_seen_as_bytes(dtype):
    found = Source(0, "low nibble first").matrix(CODES.view(dtype), 16, 16)
    assert found.dtype == torch.uint8 and torch.equal(found, CODES.view(16, 16))


def test_a_source_needs_no_copy_and_no_gradient():
    value = torch.randn(4, 6, requires_grad=True)
    for blocks in (0, 1):
        found = Source(0, "e4m3 floats", blocks).matrix(value, 6 if blocks else 4, 4 if blocks else 6)
        assert not found.requires_grad and found.data_ptr() == value.data_ptr()


@pytest.mark.parametrize("values", [1, 4, 8])
def test_a_factor_is_spread_over_the_rows(decode_of, values):
    factor = torch.rand(values)
    decode = decode_of(lambda a, f: a[2:6] * f.sum(), torch.randn(8, K), factor)
    found = Factor(leaf(decode, 1)).value(decode, [torch.randn(8, K), factor], Window(2, 8), torch.device("cpu"))
    assert torch.equal(found, factor.repeat_interleave(8 // values)[2:6])


def test_a_factor_is_float32_and_may_be_a_number(decode_of):
    live = [torch.randn(4, K), torch.rand(1, 1, dtype=torch.float64)]
    decode = decode_of(lambda a, f: a * f.float(), *live)
    found = Factor(leaf(decode, 1)).value(decode, live, Window(0, 4), torch.device("cpu"))
    assert found.dtype == torch.float32 and torch.equal(found, live[1].float().view(1).expand(4))
    number = Factor(number=0.3).value(decode, live, Window(0, 4), torch.device("cpu"))
    assert torch.equal(number, torch.full((4,), 0.3))


def test_a_weight_is_read_from_its_sources(decode_of):
    weight, live = checkpoint()
    decode = decode_of(plain, *live)
    recipe = sources(decode)
    found, factor = recipe.read(decode, live, "fc")
    assert equal(found, weight) and found.name == "fc" and recipe.kind == "e4m3"
    assert torch.equal(factor, weight.multiplier) and torch.equal(found.decode(torch.float32), plain(*live))
    assert recipe.roots(decode) == [0, 1, 2]


def test_other_live_leaves_give_another_weight(decode_of):
    _, live = checkpoint()
    weight, others = checkpoint()
    decode = decode_of(plain, *live)
    assert equal(sources(decode).read(decode, others, "fc")[0], weight)


def test_the_kind_is_that_of_the_scales(decode_of):
    weight = quantize_mxfp4(torch.randn(N, K))
    live = [weight.codes, weight.scales.view(torch.float8_e8m0fnu), torch.ones(1)]
    decode = decode_of(plain, *live)
    recipe = sources(decode, scales=Source(leaf(decode, 1), "e8m0 bytes"), group=32)
    assert recipe.kind == "e8m0" and equal(recipe.read(decode, live, "fc")[0], weight)


def test_a_divisor(decode_of):
    weight, live = checkpoint()
    live[2] = live[2].reciprocal()
    decode = decode_of(lambda c, s, f: by_groups(elements(c), s.float() / f), *live)
    found, factor = sources(decode, factor=Factor(leaf(decode, 2), divides=True)).read(decode, live, "fc")
    assert torch.equal(factor, live[2].expand(N))
    assert torch.equal(found.multiplier, live[2].reciprocal().expand(N))
    assert equal(found, FP4Weight(weight.codes, weight.scales, found.multiplier, "e4m3", 16))


def test_a_factor_of_the_scales_and_one_beside_it(decode_of):
    _, live = checkpoint()
    live[1] = live[1].float() * (torch.rand(N, 1) + 0.5)
    decode = decode_of(plain, *live)
    found, factor = sources(decode, scales=Source(leaf(decode, 1), "e4m3 floats")).read(decode, live, "fc")
    assert found.multiplier.unique().numel() > 1 and torch.equal(factor, found.multiplier)
    torch.testing.assert_close(found.decode(torch.float32), plain(*live), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("coding", ["e4m3 bytes", "e4m3 floats"])
def test_a_window_of_a_larger_weight(decode_of, coding):
    weight, live = checkpoint()
    live[2] = torch.rand(N, 1)
    if coding == "e4m3 floats":
        live[1] = live[1].float() * (torch.rand(N, 1) + 0.5)
    decode = decode_of(lambda *leaves: plain(*leaves)[8:24], *live)
    recipe = sources(decode, window=Window(8, N), scales=Source(leaf(decode, 1), coding))
    found, factor = recipe.read(decode, live, "fc")
    assert torch.equal(found.codes, weight.codes[8:24]) and (found.n, factor.shape) == (16, (16,))
    torch.testing.assert_close(found.decode(torch.float32), plain(*live)[8:24], rtol=2.0**-22, atol=0)
    assert torch.equal(factor, found.multiplier)


def test_every_other_row_of_a_larger_weight(decode_of):
    weight, live = checkpoint()
    live[2] = torch.rand(N, 1)
    decode = decode_of(lambda *leaves: plain(*leaves)[1:24:3], *live)
    found, factor = sources(decode, window=Window(1, N, 3)).read(decode, live, "fc")
    assert torch.equal(found.codes, weight.codes[1:24:3]) and torch.equal(factor, live[2][1:24:3, 0])
    assert torch.equal(found.decode(torch.float32), plain(*live)[1:24:3])
    few = Source(leaf(decode, 0), "low nibble first").read_codes(decode, live, Window(1, N, 3), [2, 4])
    assert torch.equal(few, weight.codes[[7, 13]])


def transposed(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    """``[k / 2, n]`` codes, ``[k / 16, n]`` scales; as ``[n, k]``."""
    return plain(codes.T, scales.float().T, factor)


def test_columns_that_lie_below_each_other(decode_of):
    weight, live = checkpoint()
    live[0], live[1] = live[0].T.contiguous(), live[1].T.contiguous()
    decode = decode_of(transposed, *live)
    codes, scales = Source(leaf(decode, 0), "low nibble first", 1), Source(leaf(decode, 1), "e4m3 bytes", 1)
    found, _ = sources(decode, codes=codes, scales=scales).read(decode, live, "fc")
    assert equal(found, weight) and found.codes.is_contiguous() and found.scales.is_contiguous()


def test_blocks_of_columns(decode_of):
    """Two matrices ``[k, n]`` in a stack, codes ``[2, k / 2, n]``."""
    weight, live = checkpoint()
    live[0] = torch.stack([part.T.contiguous() for part in live[0].chunk(2)])
    live[1] = torch.stack([part.T.contiguous() for part in live[1].chunk(2)])

    def function(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
        return torch.stack([transposed(codes[i], scales[i], factor).T for i in range(2)])

    decode = decode_of(function, *live, multiply=lambda x, w: x @ w)
    codes, scales = Source(leaf(decode, 0), "low nibble first", 2), Source(leaf(decode, 1), "e4m3 bytes", 2)
    found, _ = sources(decode, codes=codes, scales=scales).read(decode, live, "fc")
    assert equal(found, weight) and torch.equal(found.decode(torch.float32), decode.weight(live))


@pytest.mark.parametrize("coding", ["a number each", "a value each"])
def test_codes_of_a_computed_value_are_those_of_the_window_itself(decode_of, coding):
    weight, live = checkpoint()

    def function(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
        numbers = nibbles(codes)[8:24].clone()
        return by_groups(torch.tensor(E2M1_VALUES)[numbers.int()].clone(), scales.float()[8:24]) * factor

    decode = decode_of(function, *live)
    clones = [index for index, node in enumerate(decode.nodes) if node.target == "clone"]
    node = clones[coding == "a value each"]
    for rows in (None, [3, 5]):
        at = slice(8, 24) if rows is None else [8 + row for row in rows]
        assert torch.equal(Source(node, coding).read_codes(decode, live, Window(8, N), rows), weight.codes[at])
    found, _ = sources(decode, codes=Source(node, coding), window=Window(8, N)).read(decode, live, "fc")
    assert torch.equal(found.decode(torch.float32), plain(*live)[8:24])
    few = Source(leaf(decode, 0), "low nibble first").read_codes(decode, live, Window(8, N), [1])
    assert few.equal(weight.codes[9:10])


def test_values_are_read_in_blocks_of_rows(decode_of, monkeypatch):
    monkeypatch.setattr("marlin_w4a16.passes.judge.recipe.block_rows", partial(block_rows, elements=7 * K))
    weight, live = checkpoint()
    decode = decode_of(lambda c, s, f: by_groups(elements(c), s.float() * f), *live)
    (node,) = (i for i, n in enumerate(decode.nodes) if n.target == "flatten" and decode.roots(i) == [0])
    assert torch.equal(Source(node, "a number each").read_codes(decode, live, Window(0, N)), weight.codes)


def test_leaves_that_hold_no_weight_raise(decode_of):
    _, live = checkpoint()
    decode = decode_of(plain, *live)
    live[1].view(torch.uint8)[3, 1] = 0x7F
    with pytest.raises(ValueError, match=r"fc: scales: found NaN \(byte 0x7f\) at \[3, 1\]"):
        sources(decode).read(decode, live, "fc")


def test_recipes_of_two_graphs_read_alike(decode_of):
    _, live = checkpoint()
    one, other = decode_of(plain, *live), decode_of(lambda c, s, f: plain(c, s, f) + 0.0, *live)
    reading = sources(one).reading(one)
    assert sources(other).reading(other) == reading and isinstance(hash(reading), int)
    choices = {
        "coding": {"codes": Source(leaf(one, 0), "high nibble first")},
        "blocks": {"codes": Source(leaf(one, 0), "low nibble first", 1)},
        "blocks of scales": {"scales": Source(leaf(one, 1), "e4m3 bytes", 1)},
        "kind": {"scales": Source(leaf(one, 1), "e8m0 bytes")},
        "divides": {"factor": Factor(leaf(one, 2), divides=True)}, "number": {"factor": Factor(number=0.3)},
        "another number": {"factor": Factor(number=0.4)}, "window": {"window": Window(0, 2 * N)},
        "step": {"window": Window(0, N, 2)}, "group": {"group": 32}, "another node": {"factor": Factor(leaf(one, 1))},
    }  # fmt: skip
    readings = {str(sources(one, **choice).reading(one)) for choice in choices.values()}
    assert len(readings) == len(choices) and str(reading) not in readings


def test_how_many_rows_are_read_is_a_part_of_the_reading(decode_of):
    _, live = checkpoint()
    decodes = [decode_of(lambda *leaves, n=n: plain(*leaves)[:n], *live) for n in (16, 24)]
    readings = [sources(decode, window=Window(0, N)).reading(decode) for decode in decodes]
    assert readings[0] != readings[1]


def test_what_a_source_is_computed_by_is_a_part_of_the_reading(decode_of):
    _, live = checkpoint()
    readings = []
    for by in (2.0, 3.0):
        decode = decode_of(lambda c, s, f, by=by: plain(c, s, f * by), *live)
        (node,) = (i for i, n in enumerate(decode.nodes) if decode.roots(i) == [2] and i != leaf(decode, 2))
        readings.append(sources(decode, factor=Factor(node)).reading(decode))
    assert readings[0] != readings[1]


def joined(axis: int):
    def function(*leaves: Tensor) -> Tensor:
        return torch.cat((plain(*leaves[:3]), plain(*leaves[3:])), axis)

    return function


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_below_and_beside_each_other(decode_of, axis):
    (a, first), (b, second) = checkpoint(), checkpoint(N if axis else 16)
    if axis:
        second[2] = first[2].clone()
    live = [*first, *second]
    decode = decode_of(joined(axis), *live)
    recipe = Joined(tuple(sources(part) for part in decode.parts[1]), axis)
    found, factor = recipe.read(decode, live, "fc")
    assert (recipe.kind, recipe.group) == ("e4m3", 16) and recipe.roots(decode) == list(range(6))
    assert torch.equal(found.decode(torch.float32), joined(axis)(*live))
    assert torch.equal(found.codes, torch.cat((a.codes, b.codes), axis))
    assert torch.equal(factor, found.multiplier) and len(factor) == decode.rows


def test_parts_beside_each_other_have_one_factor(decode_of):
    live = [*checkpoint()[1], *checkpoint()[1]]
    live[5] = live[2] * 2
    decode = decode_of(joined(1), *live)
    recipe = Joined(tuple(sources(part) for part in decode.parts[1]), 1)
    with pytest.raises(ValueError, match="fc: found parts with different factors beside each other"):
        recipe.read(decode, live, "fc")


def test_joined_recipes_of_two_graphs_read_alike(decode_of):
    live = [*checkpoint()[1], *checkpoint()[1]]
    decodes = [decode_of(joined(0), *live), decode_of(lambda *v: joined(0)(*v).contiguous(), *live)]
    turned = decode_of(lambda *v: torch.cat((plain(*v[3:]), plain(*v[:3]))), *live)
    same, other = [
        [Joined(tuple(sources(part) for part in d.parts[1]), 0).reading(d) for d in group]
        for group in (decodes, [turned])
    ]
    beside = Joined(tuple(sources(part) for part in decodes[0].parts[1]), 1).reading(decodes[0])
    assert same[0] == same[1] != other[0] and same[0] != beside and isinstance(hash(same[0]), int)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_that_are_mxfp4(decode_of, dtype, monkeypatch):
    monkeypatch.setattr("marlin_w4a16.passes.judge.recipe.block_rows", partial(block_rows, elements=7 * K))
    dense = quantize_mxfp4(torch.randn(N, K)).decode(dtype)
    decode, recipe = decode_of(lambda w: w.clone(), dense), FromValue()
    found, factor = recipe.read(decode, [dense], "fc")
    assert torch.equal(found.decode(dtype), dense)
    assert (found.kind, found.group, recipe.kind, recipe.group) == ("e8m0", 32, "e8m0", 32)
    assert torch.equal(factor, torch.ones(N)) and torch.equal(found.multiplier, factor)
    assert recipe.roots(decode) == [0]
    assert recipe.reading(decode) == recipe.reading(decode_of(lambda w: w.clone(), dense))
    assert recipe.reading(decode) != recipe.reading(decode_of(lambda w: w * 2.0, dense))


def test_values_that_are_not_finite_raise(decode_of):
    dense = torch.randn(N, K)
    decode = decode_of(lambda w: w.clone(), dense)
    dense[3, 5] = torch.nan
    with pytest.raises(ValueError, match="fc: found NaN or Inf"):
        FromValue().read(decode, [dense], "fc")


@pytest.fixture
def nvfp4():
    tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor").NVFP4Tensor

    def build(dense: Tensor, **choices) -> Tensor:
        return tensor.to_nvfp4(dense, per_tensor_scale=dense.abs().amax().float() / (6 * 448), **choices)

    return build


@pytest.fixture
def mxfp4():
    tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").MXTensor
    return lambda dense, **choices: tensor.to_mx(dense, torch.float4_e2m1fn_x2, 32, **choices)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("kind, group", [("e4m3", 16), ("e8m0", 32)])
def test_a_tensor_of_torchao(decode_of, nvfp4, mxfp4, kind, group, swizzled):
    build = nvfp4 if kind == "e4m3" else mxfp4
    held, other = (build(torch.randn(N, K).bfloat16(), is_swizzled_scales=swizzled) for _ in range(2))
    decode = decode_of(lambda w: w.dequantize(), held)
    recipe = OfType(0, kind, group)
    for live in (held, other):
        found, factor = recipe.read(decode, [live], "fc")
        assert (found.kind, found.group, found.n, found.k) == (kind, group, N, K)
        torch.testing.assert_close(found.decode(torch.bfloat16), live.dequantize(), rtol=2.0**-7, atol=0)
        assert torch.equal(factor, found.multiplier)
    assert recipe.roots(decode) == [0]
    assert recipe.reading(decode) == OfType(0, kind, group).reading(decode_of(lambda w: w.dequantize(), held))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_of_torchao_of_another_shape_raises(decode_of, nvfp4):
    held = nvfp4(torch.randn(N, K).bfloat16())
    decode = decode_of(lambda w: w.dequantize()[:16], held)
    with pytest.raises(ValueError, match=rf"reads a part \[16, {K}\] of a tensor \[{N}, {K}\]"):
        OfType(0, "e4m3", 16).read(decode, [held], "fc")
