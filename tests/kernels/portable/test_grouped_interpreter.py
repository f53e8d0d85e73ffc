"""The portable kernels of mixtures without a GPU, in float16, against float64 of the exactly decoded weights."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.blocks.experts import grouped_linear_by_blocks, moe_by_blocks
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.layout import pack
from mixtures.exact import exact_groups, exact_mixture
from mixtures.oracle import ACTIVATIONS, Mixture, draw_mixture, draw_routing, draw_stack
from narrow import case, matrix, wide

# None: every pair of a token and its choice is a tile
LAUNCHES = {
    "direct": None, "16": Launch(64, 16, 128, 1, 4, 4), "32": Launch(64, 32, 128, 1, 4, 4),
    "64": Launch(128, 64, 64, 1, 4, 4),
}  # fmt: skip
SOME = ("direct", "16")
GATE = 2.3e-4  # the rounding of the output
Call = tuple[Mixture, Tensor, Tensor, Tensor, Tensor | None, Launch | None]


@pytest.fixture
def check(interpret):
    """Runs calls in one interpreter and holds each against the exact result and the plain one."""

    def run(*calls: Call) -> list[Tensor]:
        packed = [mixture.packed(torch.float16) for mixture, *_ in calls]
        given = [("mixture", (x, experts, *rest)) for experts, (_, x, *rest) in zip(packed, calls, strict=True)]
        found = interpret(*given)
        for out, experts, (mixture, x, *routing, _) in zip(found, packed, calls, strict=True):
            assert out.dtype == torch.float16
            assert_near(out, exact_mixture(in_half(mixture), x, *routing, hidden=torch.float16))
            plain = moe_by_blocks(x, experts, *routing).double()
            assert (out.double() - plain).norm() <= 2 * GATE * plain.norm()
        return found

    return run


def assert_near(out: Tensor, exact: Tensor) -> None:
    """As near as rounding the exact result, or within the gate; the rest is for values between the products that are
    rounded the other way."""
    best = (exact.half().double() - exact).norm()
    assert (out.double() - exact).norm() <= max(GATE * exact.norm(), 1.1 * best)


def in_half(mixture: Mixture) -> Mixture:
    """With the biases that float16 makes of them."""
    biases = {"bias13": mixture.bias13, "bias2": mixture.bias2}
    return replace(mixture, **{name: None if b is None else b.half().double() for name, b in biases.items()})


def tokens_of(count: int, hidden: int = 64) -> Tensor:
    return torch.randn(count, hidden).half()


FORMATS = [("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "mxfp4"), ("mxfp4", "e4m3 group 32")]
EVERY = [
    # two launches an activation, every format in every launch
    case(name, launch, FORMATS[(i + j) % 4], id=f"{name}-{launch}", narrow=(j - i - i // 4 * 2) % 4 < 2)
    for (i, name), (j, launch) in product(enumerate(ACTIVATIONS), enumerate(LAUNCHES))
]


@pytest.mark.parametrize("name, launch, formats", EVERY)
def test_every_activation_in_every_tile(name, launch, formats, check):
    """Tiles that are full, cut and left out; a format is another one for every activation and tile."""
    mixture, tokens = draw_mixture(3, 96, 96, name, formats, biases=True), 4 if launch == "direct" else 35
    check((mixture, tokens_of(tokens, 96), *draw_routing(tokens, 2, 3), None, LAUNCHES[launch]))


# any two of the three together
SIDES = matrix(lambda biases, on_input, tiled: biases ^ on_input ^ tiled, [False, True], [False, True], SOME)


@pytest.mark.parametrize("biases, weight_on_input, launch", SIDES)
def test_biases_and_weights_on_either_side(biases, weight_on_input, launch, check):
    mixture = draw_mixture(3, 64, 64, "gpt-oss", biases=biases, weight_on_input=weight_on_input)
    dtype = torch.float16 if launch == "direct" else torch.float32
    check((mixture, tokens_of(4), *draw_routing(4, 2, 3, dtype), None, LAUNCHES[launch]))


OF_SIZES = {"direct": FORMATS[0], "16": FORMATS[1], "64": FORMATS[3]}
SIZES = matrix(lambda *places: sum(places) % 3 == 0, ["Qwen3", "NemotronH"], [64, 96, 100, 176, 192], [*OF_SIZES])


@pytest.mark.parametrize("name, intermediate, launch", SIZES)
def test_intermediate_sizes_that_no_tile_divides(name, intermediate, launch, check):
    mixture = draw_mixture(2, 96, intermediate, name, OF_SIZES[launch], biases=True)
    check((mixture, tokens_of(3, 96), *draw_routing(3, 1, 2), None, LAUNCHES[launch]))


IDS = {
    "all on one": [[2], [2], [2], [2]], "none on some": [[0, 3], [3, 0], [0, 3]],
    "the same twice": [[1, 1], [2, 2], [1, 2]], "-1": [[-1, 0], [1, -1], [-1, -1]],
    "their number and beyond": [[4, 0], [1, 5], [1 << 31, -(1 << 31)]], "nothing local": [[-1, 9], [4, -7]],
}  # fmt: skip


@pytest.mark.parametrize("ids, short", matrix(lambda i, short: (i + short) % 2 == 0, IDS, [False, True]))
def test_any_choice_and_what_is_not_local_is_not_read(ids, short, check):
    mixture, ids = draw_mixture(4, 64, 64, "gpt-oss", biases=True), torch.tensor(ids)
    elsewhere = (ids < 0) | (ids >= 4)
    x, weights = tokens_of(len(ids)), torch.rand(ids.shape)
    x[elsewhere.all(1)] = torch.nan
    weights[elsewhere] = torch.nan
    narrow = ids.clamp(-(1 << 15), 32767)
    direct, tiled = (ids, narrow.short()) if short else (narrow.int(), ids)
    found = check((mixture, x, weights, direct, None, None), (mixture, x, weights, tiled, None, LAUNCHES["16"]))
    for out in found:
        assert torch.equal(out[elsewhere.all(1)], torch.zeros(int(elsewhere.all(1).sum()), 64).half())


MAPS = [[-1, 2, 0, -1, 1, 3, -1], [4, 0, 99, 1], [-1, -1]]
MAPPED = matrix(lambda *places: sum(places) % 2 == 0, dict(enumerate(MAPS)), [False, True], SOME)


@pytest.mark.parametrize("expert_map, on_input, launch", MAPPED)
def test_a_map_says_where_experts_are(expert_map, on_input, launch, check):
    mixture = draw_mixture(4, 64, 64, biases=True, weight_on_input=on_input)
    ids = torch.tensor([[0, 1, 2], [4, 5, 3], [6, -1, 7], [2, 2, 99]])
    dtype = torch.int32 if len(expert_map) == 4 else torch.int64
    check((mixture, tokens_of(4), torch.rand(4, 3), ids, torch.tensor(expert_map, dtype=dtype), LAUNCHES[launch]))


@pytest.mark.parametrize("launch", ["direct", wide("16")])
def test_as_many_experts_as_a_byte_holds(launch, check):
    """Ids beyond the last pair are no expert, though a byte has no -1; for tiles see decode/test_route.py."""
    mixture = draw_mixture(256, 32, 32)
    ids = torch.tensor([[255, 3], [0, 255], [7, 8]], dtype=torch.uint8)
    check((mixture, tokens_of(3, 32), torch.rand(3, 2), ids, None, LAUNCHES[launch]))


STRIDES = {
    "transposed": lambda: torch.randn(64, 4).half().T,
    "sliced": lambda: torch.randn(8, 192).half()[::2, 64:128],
    "expanded": lambda: tokens_of(1).expand(4, 64),
}


@pytest.mark.parametrize("x, launch", matrix(lambda *places: sum(places) % 2 == 0, STRIDES, SOME))
def test_any_strides(x, launch, check):
    mixture, routing = draw_mixture(3, 64, 64, biases=True), draw_routing(4, 2, 3)
    check((mixture, x(), *(t.T.contiguous().T for t in routing), None, LAUNCHES[launch]))


OFFSETS = {
    "every group": ([5, 21, 70], 70), "empty groups": ([0, 33, 33], 33), "a tail": ([2, 2, 17], 40),
    "only a tail": ([0, 0, 0], 20), "one row": ([0, 1, 1], 1),
}  # fmt: skip


OF_GROUPED = {"16": "nvfp4", "32": "mxfp4", "64": "e4m3 group 32"}


@pytest.mark.parametrize("given, launch", matrix(lambda i, j: (i - j) % 3 == 0, OFFSETS, [*OF_GROUPED]))
def test_grouped_linear(given, launch, interpret):
    offsets, rows = given
    weight = draw_stack(3, 100, 160, OF_GROUPED[launch])
    x = torch.randn(160, rows).half().T if launch == "32" else torch.randn(rows, 320).half()[:, :160]
    of = torch.tensor(offsets, dtype=torch.int64 if launch == "32" else torch.int32)
    (out,) = interpret(("grouped", (x, pack(weight), of, LAUNCHES[launch])))
    assert_near(out, exact_groups(weight, x, of))
    assert torch.equal(out[of[-1] :], torch.zeros(rows - int(of[-1]), 100).half())
    plain = grouped_linear_by_blocks(x, pack(weight), of).double()
    assert (out.double() - plain).norm() <= 2 * GATE * plain.norm()
