"""The schedule of the Hopper kernel for more tokens: what its producer, its consumers and its sums agree on.

The functions of the kernel run in Python, on integers in the place of scalars of Triton.
"""

from types import SimpleNamespace

import pytest
import triton
from hypothesis import given
from hypothesis import strategies as st

from marlin_w4a16.kernels.hopper_launch import division, plan_hopper
from marlin_w4a16.kernels.launch import Stream
from marlin_w4a16.kernels.target import gluon_is_known

if not gluon_is_known():
    pytest.skip(f"the Gluon kernels are not used with Triton {triton.__version__}", allow_module_level=True)

from marlin_w4a16.kernels.hopper import schedule


class Scalar(int):
    """An integer with the conversion of a scalar of Triton; results of its arithmetic are such integers too."""

    def to(self, dtype: object) -> "Scalar":
        return self


for name in ("add", "sub", "mul", "floordiv", "mod", "radd", "rsub", "rmul", "rfloordiv"):
    operation = getattr(int, f"__{name}__")
    setattr(Scalar, f"__{name}__", lambda a, b, operation=operation: Scalar(operation(a, b)))

LANGUAGE = SimpleNamespace(
    minimum=lambda a, b: Scalar(min(a, b)), maximum=lambda a, b: Scalar(max(a, b)),
    where=lambda condition, a, b: Scalar(a if condition else b), int32=None, int64=None,
)  # fmt: skip
SIZE, K_BLOCKS = st.integers(1, 12), st.integers(1, 30)


@pytest.fixture(scope="module")
def kernel():
    """The device functions of the module as Python functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "gl", LANGUAGE)
        for name in ("share", "place", "k_block"):
            patch.setattr(schedule, name, getattr(schedule, name).fn)
        yield schedule


def consumed(kernel, pid: int, work: schedule.Work):
    """What `_consume` does with its counters: the k-blocks it multiplies, and what it writes."""
    k_blocks, whole, programs, blocks = work.k_blocks, work.whole, work.programs, work[:2]
    own, first, last = kernel.share(Scalar(pid), work)
    steps = own * k_blocks + last - first
    tile, at = (pid, 0) if own > 0 else (whole + first // k_blocks, first % k_blocks)
    begun, met, written = at, [], []
    for step in range(steps):
        met.append((*kernel.place(Scalar(tile), *blocks), at))
        at += 1
        if at == k_blocks or step == steps - 1:
            slab = None if begun == 0 and at == k_blocks else 2 * pid + (own < 0)
            written.append((tile, slab))
            own -= 1
            tile = tile + programs if own > 0 else whole + first // k_blocks if own == 0 else tile + 1
            begun = at = first % k_blocks if own == 0 else 0
    return met, written


def summed(tile: int, k_blocks: int, rest: int, sharers: int) -> list[int]:
    """The parts that `_sum_kernel` adds for a tile of the rest; none where one program has all of it."""
    begin, total = tile * k_blocks, rest * k_blocks
    low, high = ((begin + 1) * sharers - 1) // total, ((begin + k_blocks) * sharers - 1) // total
    return [2 * p + (p * total // sharers < begin) for p in range(low, high + 1)] if low < high else []


@given(tiles_n=st.integers(1, 40), tiles_m=st.integers(1, 40))
def test_every_tile_of_the_output_has_its_place(kernel, tiles_n, tiles_m):
    places = {kernel.place(Scalar(tile), tiles_n, tiles_m) for tile in range(tiles_n * tiles_m)}
    assert places == {(n, m) for n in range(tiles_n) for m in range(tiles_m)}


@given(programs=st.integers(1, 40), shared=st.integers(1, 40), tiles_n=SIZE, tiles_m=SIZE, k_blocks=K_BLOCKS)
def test_every_k_block_is_met_once_and_every_part_summed(kernel, programs, shared, tiles_n, tiles_m, k_blocks):
    tiles, blocks = tiles_n * tiles_m, (tiles_n, tiles_m)
    rest, sharers, programs = division(Stream(64, 64, 4, 3, 4, True, programs, shared), tiles, k_blocks)
    whole = tiles - rest
    work = schedule.Work(*blocks, k_blocks, whole, Scalar(rest), sharers, programs)
    met, finished, parts = [], [], {}
    for pid in range(programs):
        own, first, last = kernel.share(Scalar(pid), work)
        steps = own * k_blocks + last - first
        assert steps > 0, "a program that waits for a k-block it never gets"
        copied = [kernel.k_block(Scalar(step), pid, own, first, work) for step in range(steps)]
        used, written = consumed(kernel, pid, work)
        assert copied == used
        met += used
        for tile, slab in written:
            finished += [tile] * (slab is None)
            parts.setdefault(tile, []).extend([] if slab is None else [slab])
    assert sorted(met) == sorted((n, m, u) for n in range(tiles_n) for m in range(tiles_m) for u in range(k_blocks))
    for tile in range(tiles):
        assert parts[tile] == (summed(tile - whole, k_blocks, rest, sharers) if tile >= whole else [])
        assert finished.count(tile) == (not parts[tile])
    slabs = [slab for some in parts.values() for slab in some]
    assert len(slabs) == len(set(slabs)) and all(slab < 2 * sharers for slab in slabs)


@given(processors=st.integers(1, 200), m=st.integers(17, 9000), n=st.integers(1, 1 << 16), k=st.integers(1, 1 << 15))
def test_a_wave_is_shared_by_more_programs_than_it_has_tiles(processors, m, n, k):
    launch = plan_hopper(processors, m, n, k)
    rest = -(-n // launch.rows) * -(-m // launch.block_m) % processors
    assert launch.sharers == 1 or rest < launch.sharers <= processors
    if m > 128 and launch.sharers > 1:
        assert launch.sharers % rest == 0, "programs at the same columns of a token block share what they read of x"
