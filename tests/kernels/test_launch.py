"""The launch table: pure arithmetic, so every plan there is can be looked at without a GPU."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.plans import PROCESSORS, SIZES, TOKENS, hopper_plans, launches
from marlin_w4a16.kernels.hopper_launch import division, plan_hopper
from marlin_w4a16.kernels.launch import DENSE_TOKENS, Launch, Rows, Stream, plan_dense, plan_linear
from marlin_w4a16.kernels.target import SHARED_MEMORY, Target

# Multiprocessors of A100, RTX 3090, Jetson Orin, L40S, H200.
CHIPS = {(8, 0): 108, (8, 6): 82, (8, 7): 16, (8, 9): 142, (9, 0): 132}
WEIGHT_ROWS = st.integers(1, 1 << 20)
COLUMNS = st.integers(1, 1 << 16).map(lambda groups: groups * 16)
every_chip = pytest.mark.parametrize("capability", CHIPS, ids=str)


def is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def unsplit(launch: Launch) -> Launch:
    return replace(launch, split_k=1)


def plans(capability: tuple[int, int]) -> dict[tuple[int, int, int], Launch]:
    target = Target(capability, CHIPS[capability])
    return {(m, n, k): plan_linear(target, m, n, k) for n, k, m in product(SIZES, SIZES, TOKENS)}


@given(
    capability=st.sampled_from(list(CHIPS)), processors=st.integers(1, 256), m=st.integers(1, 1 << 20), n=WEIGHT_ROWS,
    k=COLUMNS,
)  # fmt: skip
@settings(max_examples=1000)
def test_every_call_has_a_launch_the_kernel_can_run(capability, processors, m, n, k):
    launch = plan_linear(Target(capability, processors), m, n, k)
    assert launch.block_n in (64, 128) and launch.block_k in (64, 128)
    assert is_power_of_two(launch.block_m) and 16 <= launch.block_m <= 256
    assert launch.num_warps in (4, 8) and launch.num_warps * 16 <= launch.block_n
    assert 1 <= launch.num_stages <= 5 and is_power_of_two(launch.split_k)
    tiles = -(-n // launch.block_n) * -(-m // launch.block_m)
    if launch.split_k > 1:
        assert tiles * launch.split_k <= 4 * processors, "more programs than a wave or two"
        assert k // launch.block_k >= 8 * launch.split_k - 1, "parts too short to be worth a sum"


@every_chip
def test_a_launch_that_is_compiled_ahead_covers_every_plan(capability):
    compiled = launches(capability)
    for launch in plans(capability).values():
        assert unsplit(launch) in compiled
        if launch.split_k > 1:
            assert replace(launch, split_k=4) in compiled


@every_chip
def test_every_launch_of_the_table_is_somebodys(capability):
    used = {(unsplit(launch), launch.split_k > 1) for launch in plans(capability).values()}
    assert {(unsplit(launch), launch.split_k > 1) for launch in launches(capability)} == used


@every_chip
def test_more_tokens_never_get_a_smaller_block(capability):
    found = plans(capability)
    for n, k in product(SIZES, SIZES):
        blocks = [found[m, n, k].block_m for m in TOKENS]
        assert blocks == sorted(blocks)


@every_chip
def test_up_to_128_tokens_the_weight_is_read_once(capability):
    assert all(launch.block_m >= m for (m, *_), launch in plans(capability).items() if m <= 128)


@every_chip
@pytest.mark.parametrize("n", [1024, 4096, 8192])
def test_one_token_splits_k_to_fill_the_chip(capability, n):
    """At least every other multiprocessor works, as long as k is long enough to be shared out."""
    launch = plan_linear(Target(capability, CHIPS[capability]), 1, n, 1 << 20)
    assert -(-n // launch.block_n) * launch.split_k * 2 > CHIPS[capability]


@every_chip
def test_a_short_k_is_not_split(capability):
    assert all(plan_linear(Target(capability, CHIPS[capability]), m, 64, 512).split_k == 1 for m in TOKENS)


@every_chip
def test_the_shared_memory_of_every_chip_is_known(capability):
    assert SHARED_MEMORY[capability] >= 99 << 10


def test_from_the_threshold_on_the_weight_is_written_out_for_cublas():
    assert [plan_dense(m) for m in (0, 1, DENSE_TOKENS - 1, DENSE_TOKENS, 1 << 20)] == [False, False, False, True, True]


def in_flight(launch: Rows | Stream, processors: int) -> int:
    """Programs a multiprocessor holds at once."""
    return 2 if launch.programs > processors else 1


@given(processors=st.integers(1, 256), m=st.integers(1, 1 << 16), n=WEIGHT_ROWS, k=COLUMNS)
@settings(max_examples=1000)
def test_every_call_on_hopper_has_a_launch_its_kernels_can_run(processors, m, n, k):
    launch = plan_hopper(processors, m, n, k)
    assert launch == plan_hopper.__wrapped__(processors, m, n, k), "not pure"  # past the cache
    each = in_flight(launch, processors)
    assert each * (launch.shared_memory + 1024) <= 228 << 10
    assert is_power_of_two(launch.num_warps) and 4 <= launch.num_warps <= 16
    if isinstance(launch, Rows):
        assert launch.rows in (16, 32, 64) and launch.block_m in (8, 16) and launch.num_warps in (8, 16)
        assert launch.block_m >= m, "tokens that no program takes"
        assert launch.steps in (1, 2) and launch.stages >= 1
        blocks = -(-n // launch.rows)
        assert 1 <= launch.programs <= min(blocks, 2 * processors), "a program without a block, or one that waits"
        assert launch.num_warps * each <= 16
        x = launch.stages * launch.steps * launch.num_warps * 64
        assert x >= k if launch.resident else launch.stages >= 2
    else:
        assert launch.rows in (64, 128, 256) and is_power_of_two(launch.block_m) and 16 <= launch.block_m <= 256
        assert launch.block_m >= min(m, 64)
        assert is_power_of_two(launch.tiles) and launch.stages >= 2
        assert launch.num_warps * 16 <= launch.rows, "warps without rows"
        assert launch.wgmma or not launch.overlap
        assert launch.tiles % 2 == 0 or not launch.overlap, "operands do not take turns in two sets of registers"
        tiles, k_blocks = -(-n // launch.rows) * -(-m // launch.block_m), -(-k // (64 * launch.tiles))
        assert 1 <= launch.programs <= min(tiles * k_blocks, processors), (
            "a program without a k-block, or one that waits"
        )
        rest, sharers, programs = division(launch, tiles, k_blocks)
        assert programs == launch.programs and (rest > 0) == (launch.sharers > 1)
        assert 2 * sharers * launch.rows * launch.block_m * 4 <= 64 << 20, "too much scratch"


def test_up_to_64_more_tokens_never_get_a_smaller_block_on_hopper():
    found = hopper_plans()
    for n, k in product(SIZES, SIZES):
        blocks = [found[m, n, k].block_m for m in TOKENS if m <= 64]
        assert blocks == sorted(blocks)


def test_up_to_64_tokens_the_weight_is_read_once_on_hopper():
    assert all(launch.block_m >= m for (m, *_), launch in hopper_plans().items() if m <= 64)


@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize("n, k", [(4096, 4096), (6144, 4096), (28672, 8192), (2880, 2880), (4096, 14336)])
def test_on_hopper_most_multiprocessors_work(m, n, k):
    """Every other one at least, of a weight as models have it."""
    assert 2 * plan_hopper(PROCESSORS, m, n, k).programs >= PROCESSORS
