"""The launches of the gradient of a linear's input: pure arithmetic."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.plans import PROCESSORS, SIZES, TOKENS, grad_launches
from marlin_w4a16.kernels.grad_launch import GradLaunch, plan_grad_input
from marlin_w4a16.kernels.target import Target

every_chip = pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)], ids=str)


def plans(capability: tuple[int, int]) -> dict[tuple[int, int, int], GradLaunch]:
    target = Target(capability, PROCESSORS)
    found = {(m, n, k): plan_grad_input(target, m, n, k) for n, k, m in product(SIZES, SIZES, TOKENS)}
    return {call: launch for call, launch in found.items() if launch is not None}


@every_chip
@given(processors=st.integers(1, 256), m=st.integers(1, 255), n=st.integers(1, 1 << 20), k=st.integers(1, 1 << 20))
@settings(max_examples=300)
def test_every_call_has_a_launch_the_kernel_can_run(capability, processors, m, n, k):
    launch = plan_grad_input(Target(capability, processors), m, n, k)
    assert launch.block_k in (64, 128, 256) and launch.block_n in (64, 128)
    assert launch.block_m in (16, 32, 64, 128, 256) and launch.num_warps in (4, 8)
    assert launch.split_n >= 1 and launch.split_n & (launch.split_n - 1) == 0
    tiles = -(-k // launch.block_k) * -(-m // launch.block_m)
    if launch.split_n > 1:
        assert tiles * launch.split_n <= 4 * processors, "more programs than a wave or two"
        assert n // launch.block_n >= 8 * launch.split_n - 1, "parts too short to be worth a sum"


@every_chip
def test_a_launch_that_is_compiled_ahead_covers_every_plan(capability):
    compiled = grad_launches(capability)
    assert {replace(launch, split_n=4 if launch.split_n > 1 else 1) for launch in plans(capability).values()} == set(
        compiled
    )


@every_chip
def test_up_to_128_tokens_the_weight_is_read_once(capability):
    assert all(launch.block_m >= m for (m, *_), launch in plans(capability).items() if m <= 128)


@every_chip
@pytest.mark.parametrize("k", [1024, 4096, 8192])
def test_one_token_splits_n_to_fill_the_chip(capability, k):
    launch = plan_grad_input(Target(capability, PROCESSORS), 1, 1 << 20, k)
    assert -(-k // launch.block_k) * launch.split_n * 2 > PROCESSORS


@every_chip
def test_from_256_tokens_on_the_weight_is_written_out_for_cublas(capability):
    calls = [plan_grad_input(Target(capability, PROCESSORS), m, 4096, 4096) for m in (1, 255, 256, 1 << 20)]
    assert [call is None for call in calls] == [False, False, True, True]
