"""Mixtures of experts on a GPU against float64 of the exactly decoded weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.moe import activation_args
from marlin_w4a16.fake_impls.moe import moe as op
from marlin_w4a16.kernels.blocks.experts import moe_by_blocks
from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.launch import Launch
from marlin_w4a16.kernels.moe import fused, moe
from marlin_w4a16.kernels.target import Target
from mixtures.exact import drawn, exact_mixture
from mixtures.oracle import ACTIVATIONS, Mixture, draw_routing

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]

TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 127, 129, 255, 257, 1000, 4096)
FORMATS = [("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("nvfp4", "mxfp4"), ("mxfp4", "e4m3 group 32")]
BLOCK = {torch.bfloat16: 4e-3, torch.float16: 6e-4}  # the gate of a whole block
GATES = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}  # the rounding of the output alone
DTYPES = pytest.mark.parametrize("dtype", GATES, ids=str)
# Of the portable kernel: a tile for every pair, and each size of a tile that pairs share.
LAUNCHES = (
    None, Launch(64, 16, 128, 1, 4, 4), Launch(64, 32, 128, 1, 4, 4), Launch(64, 64, 64, 1, 4, 4),
    Launch(128, 128, 64, 1, 8, 3),
)  # fmt: skip


def assert_right(out: Tensor, mixture: Mixture, x: Tensor, *routing: Tensor | None) -> None:
    """Within the gate of a block; and but for the rounding between the products, as near as rounding the result."""
    assert (out.dtype, out.shape) == (x.dtype, (len(x), mixture.w2.n))
    assert not out.isnan().any()
    exact = exact_mixture(mixture, x, *routing)
    assert (out.double() - exact).norm() <= BLOCK[x.dtype] * exact.norm()
    exact = exact_mixture(mixture, x, *routing, hidden=x.dtype)
    best = (exact.to(x.dtype).double() - exact).norm()
    assert (out.double() - exact).norm() <= max(GATES[x.dtype] * exact.norm(), 1.1 * best)


def run(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
    return moe(x, experts, weights, ids, expert_map)


def check(mixture: Mixture, experts: Experts, x: Tensor, *routing: Tensor | None) -> Tensor:
    """A call that is right, twice with the same bits."""
    out = run(experts, x, *routing)
    assert_right(out, mixture, x, *routing)
    assert torch.equal(out, run(experts, x, *routing))
    return out


@DTYPES
@pytest.mark.parametrize("formats", FORMATS[:2], ids=" ".join)
@pytest.mark.parametrize("name", ["gpt-oss", "NemotronH"])
def test_every_number_of_tokens(name, formats, dtype, poisoned):
    mixture, experts = drawn(dtype, 8, 224, 96, name, formats, biases=True)
    for tokens in TOKENS:
        weights, ids = draw_routing(tokens, 3, 8)
        check(mixture, experts, torch.randn(tokens, 224, dtype=dtype), weights, ids)


@DTYPES
@pytest.mark.parametrize("number, intermediate", list(enumerate([64, 96, 100, 176, 192, 704, 1856, 2880])))
@pytest.mark.parametrize("hidden, name", [(2880, "gpt-oss"), (224, "NemotronH"), (96, "Qwen3")])
def test_sizes_that_no_tile_divides(hidden, name, number, intermediate, dtype, poisoned):
    formats = FORMATS[(number + len(name)) % 4]
    mixture, experts = drawn(dtype, 4, hidden, intermediate, name, formats, biases=name == "gpt-oss")
    for tokens in (1, 5, 70, 600):
        check(mixture, experts, torch.randn(tokens, hidden, dtype=dtype), *draw_routing(tokens, 2, 4))


def test_a_hidden_size_of_groups_of_16(poisoned):
    mixture, experts = drawn(torch.bfloat16, 4, 208, 176)
    for tokens in (1, 40, 300):
        check(mixture, experts, torch.randn(tokens, 208, dtype=torch.bfloat16), *draw_routing(tokens, 2, 4))


@DTYPES
@pytest.mark.parametrize("weight_on_input", [False, True])
@pytest.mark.parametrize("number, name", list(enumerate(ACTIVATIONS)), ids=ACTIVATIONS)
def test_every_activation_and_weights_on_either_side(number, name, weight_on_input, dtype, poisoned):
    formats = FORMATS[(number + weight_on_input) % 4]
    mixture, experts = drawn(dtype, 4, 96, 100, name, formats, number % 2 == 0, weight_on_input=weight_on_input)
    for tokens in (3, 50):
        weights, ids = draw_routing(tokens, 2, 4, (torch.float32, dtype)[tokens % 2])
        check(mixture, experts, torch.randn(tokens, 96, dtype=dtype), weights, ids)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("wgmma", [True, False], ids=["wgmma", "mma"])
@pytest.mark.parametrize("dtype, formats", list(zip(GATES, FORMATS, strict=False)), ids=str)
def test_every_launch_of_the_portable_kernel_is_right_many_times(launch, wgmma, dtype, formats, poisoned):
    if wgmma and not Target.of(torch.device("cuda")).hopper:
        pytest.skip("needs capability 9.0")
    mixture, experts = drawn(dtype, 5, 352, 1056, "gpt-oss", formats, biases=True)
    x, (weights, ids) = torch.randn(90, 352, dtype=dtype), draw_routing(90, 2, 5)

    def call() -> Tensor:
        out = torch.empty_like(x)
        fused(x, experts, weights, ids, None, out, launch, ptx=True, wgmma=wgmma)
        return out

    first = call()
    assert_right(first, mixture, x, weights, ids)
    for _ in range(20):
        assert torch.equal(first, call())


IDS = {
    "all on one": [[2], [2], [2]], "none on some": [[0, 3], [3, 0], [0, 3]],
    "the same twice": [[1, 1], [2, 2], [1, 2]], "three times": [[1, 1, 1], [1, 1, 1], [0, 0, 1]],
    "-1": [[-1, 0], [1, -1], [-1, -1]], "their number": [[4, 0], [1, 4], [4, 4]],
    "beyond": [[5, 0], [1 << 31, 1], [100, -(1 << 31)]], "nothing local": [[-1, 9], [4, -7], [-1, -1]],
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("times", [1, 30, 400])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_any_choice_and_what_is_not_local_is_not_read(ids, times, dtype, poisoned):
    mixture, experts = drawn(dtype, 4, 96, 96, "gpt-oss", biases=True)
    ids = torch.tensor(ids).repeat(times, 1)
    elsewhere = (ids < 0) | (ids >= 4)
    x, weights = torch.randn(len(ids), 96, dtype=dtype), torch.rand(ids.shape)
    x[elsewhere.all(1)] = torch.nan
    weights[elsewhere] = torch.nan
    for expert in set(range(4)) - set(ids.unique().tolist()):
        for tensor in (experts.w13.multiplier, experts.w2.multiplier, experts.bias13, experts.bias2):
            tensor[expert] = torch.nan
    out = check(mixture, experts, x, weights, ids)
    assert torch.equal(out[elsewhere.all(1)], torch.zeros(int(elsewhere.all(1).sum()), 96, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 20, 300])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_any_dtype(dtype, tokens, poisoned):
    """256 experts: a byte has no number that is none of them."""
    mixture, experts = drawn(torch.bfloat16, 256, 64, 64)
    weights, ids = draw_routing(tokens, 5, 256)
    ids[-1, -1] = 255
    check(mixture, experts, torch.randn(tokens, 64, dtype=torch.bfloat16), weights, ids.to(dtype))


@pytest.mark.parametrize(
    "experts, k, tokens", [(1, 1, 3), (8, 8, 50), (64, 6, 33), (128, 22, 4), (512, 10, 8), (512, 22, 300)]
)
def test_many_experts_and_choices(experts, k, tokens, poisoned):
    mixture, packed = drawn(torch.bfloat16, experts, 96, 64, "gpt-oss", biases=True)
    check(mixture, packed, torch.randn(tokens, 96, dtype=torch.bfloat16), *draw_routing(tokens, k, experts))


@pytest.mark.parametrize("times", [1, 50])
@pytest.mark.parametrize(
    "expert_map",
    [[-1, 2, 0, -1, 1, 3, -1], [3, 2, 1, 0], [-1, -1, -1], [4, 0, 99, 1]],
    ids=["some elsewhere", "permuted", "all elsewhere", "beyond"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_map_says_where_experts_are(expert_map, times, dtype, poisoned):
    mixture, experts = drawn(torch.bfloat16, 4, 64, 96, biases=True)
    ids = torch.tensor([[0, 1, 2], [4, 5, 3], [6, -1, 7], [2, 2, 99]]).repeat(times, 1)
    x, weights = torch.randn(len(ids), 64, dtype=torch.bfloat16), torch.rand(ids.shape)
    check(mixture, experts, x, weights, ids, torch.tensor(expert_map, dtype=dtype))


def test_parts_of_all_experts_add_up(poisoned):
    """Expert parallelism: every part has some experts and a map; their outputs add up to the whole."""
    mixture, whole = drawn(torch.float16, 8, 96, 64, biases=True)
    x, (weights, ids) = torch.randn(60, 96, dtype=torch.float16), draw_routing(60, 3, 8)
    total = torch.zeros(60, 96, dtype=torch.float64)
    for start in range(0, 8, 2):
        own, expert_map = slice(start, start + 2), torch.full((8,), -1)
        expert_map[own] = torch.arange(2)
        parts = [replace(w, **{n: getattr(w, n)[own] for n in ("words", "scales", "multiplier")})
                 for w in (whole.w13, whole.w2)]  # fmt: skip
        part = Experts(*parts, whole.activation, whole.bias13[own], whole.bias2[own])
        total += run(part, x, weights, ids, expert_map).double()
    exact = exact_mixture(mixture, x, weights, ids)
    assert (total - exact).norm() <= BLOCK[torch.float16] * exact.norm()


STRIDED = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "rows apart": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "rows apart by an odd number": lambda x: torch.nn.functional.pad(x, (0, 3))[:, : x.shape[1]],
    "one row repeated": lambda x: x[:1].expand(x.shape),
    "off the 16-byte grid": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("tokens", [1, 9, 100])
@pytest.mark.parametrize("how", STRIDED)
def test_any_strides(how, tokens):
    mixture, experts = drawn(torch.bfloat16, 4, 96, 96, biases=True)
    x = STRIDED[how](torch.randn(tokens, 96, dtype=torch.bfloat16))
    routing = [t.t().contiguous().t() for t in draw_routing(tokens, 2, 4)]
    out = check(mixture, experts, x, *routing)
    assert torch.equal(out, run(experts, x.contiguous(), *(t.contiguous() for t in routing)))


def test_weights_of_more_than_two_to_the_31_elements():
    experts, n, k = 264, 2048, 2048
    mixture, packed = drawn(torch.bfloat16, experts, k, n, "Qwen3", biases=True)
    assert mixture.w13.codes.numel() * 2 > 1 << 31
    for tokens in (2, 70):
        x, weights = torch.randn(tokens, k, dtype=torch.bfloat16), torch.rand(tokens, 2)
        check(mixture, packed, x, weights, torch.tensor([experts - 1, experts - 2]).expand(tokens, 2))


def test_pairs_of_more_than_two_to_the_31_values():
    tokens, k, hidden = 67_000, 8, 4032
    mixture, experts = drawn(torch.bfloat16, 8, hidden, 32, "NemotronH")
    assert tokens * k * hidden > 1 << 31
    x, (weights, ids) = torch.randn(tokens, hidden, dtype=torch.bfloat16), draw_routing(tokens, k, 8)
    out = run(experts, x, weights, ids)
    for some in (slice(0, 16), slice(-16, None)):
        assert_right(out[some], mixture, x[some], weights[some], ids[some])


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
def test_a_token_alone_equals_the_token_in_a_batch_of_the_same_launch(launch):
    _, experts = drawn(torch.bfloat16, 4, 352, 1056, "gpt-oss", biases=True)
    x, (weights, ids) = torch.randn(80, 352, dtype=torch.bfloat16), draw_routing(80, 2, 4)

    def call(some: slice) -> Tensor:
        out, wgmma = torch.empty_like(x[some]), Target.of(torch.device("cuda")).hopper
        fused(x[some], experts, weights[some], ids[some], None, out, launch, ptx=True, wgmma=wgmma)
        return out

    together = call(slice(None))
    for token in (0, 41, 79):
        assert torch.equal(call(slice(token, token + 1)), together[token : token + 1])


def arguments(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> tuple:
    packed = (*weight_args(experts.w13), *weight_args(experts.w2), experts.bias13, experts.bias2)
    return (x, weights, ids, *packed, *activation_args(experts.activation), experts.weight_on_input, expert_map)


@DTYPES
@pytest.mark.parametrize("tokens", [0, 5, 40])
@pytest.mark.parametrize("grads", [False, True])
def test_opcheck(grads, tokens, dtype):
    _, experts = drawn(dtype, 4, 64, 96, "gpt-oss", biases=True)
    x, (weights, ids) = torch.randn(tokens, 64, dtype=dtype), draw_routing(tokens, 2, 4)
    for tensor in (x, weights, experts.bias13, experts.bias2):
        tensor.requires_grad_(grads)
    torch.library.opcheck(torch.ops.marlin_w4a16.moe.default, arguments(experts, x, weights, ids))


def test_the_op_runs_the_kernels_and_float32_goes_through_blocks():
    mixture, experts = drawn(torch.bfloat16, 4, 64, 96, "gpt-oss", biases=True)
    x, routing = torch.randn(40, 64, dtype=torch.bfloat16), draw_routing(40, 2, 4)
    how = {"activation": experts.activation, "bias13": experts.bias13, "bias2": experts.bias2}
    assert torch.equal(op(x, experts.w13, experts.w2, *routing, **how), run(experts, x, *routing))
    wide, exact = op(x.float(), experts.w13, experts.w2, *routing, **how), exact_mixture(mixture, x, *routing)
    assert (wide.double() - exact).norm() <= 1e-5 * exact.norm()


def test_it_agrees_with_the_plain_one():
    _, experts = drawn(torch.bfloat16, 8, 352, 192, "gpt-oss", biases=True)
    x, (weights, ids) = torch.randn(64, 352, dtype=torch.bfloat16), draw_routing(64, 2, 8)
    plain = moe_by_blocks(x, experts, weights, ids, None).double()
    assert (run(experts, x, weights, ids).double() - plain).norm() <= BLOCK[torch.bfloat16] * plain.norm()


def test_compiled_with_any_number_of_tokens():
    mixture, experts = drawn(torch.bfloat16, 4, 64, 96, "gpt-oss", biases=True)
    how = {"activation": experts.activation, "bias13": experts.bias13, "bias2": experts.bias2}
    compiled = torch.compile(lambda x, *routing: op(x, experts.w13, experts.w2, *routing, **how), fullgraph=True)
    for tokens in (7, 3, 64):
        x, routing = torch.randn(tokens, 64, dtype=torch.bfloat16), draw_routing(tokens, 2, 4)
        for tensor in (x, *routing):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_right(compiled(x, *routing), mixture, x, *routing)
