"""Launch parameters of the kernels of Hopper: what each choice is expected to take, read by a pure function.

Measured on an H200 (docs/performance.md).
"""

from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import inf
from typing import NamedTuple

from marlin_w4a16.kernels.launch import Rows, Stream
from marlin_w4a16.kernels.target import SHARED_MEMORY


class _Resident(NamedTuple):
    """A launch on Hopper, and how many of its programs a multiprocessor holds."""

    launch: Stream
    programs: int


_BY_FEW = _Resident(Stream(64, 8, 4, 3, 4, False, registers=64), 4)
_BY_8 = _Resident(Stream(128, 8, 4, 2, 4, False, registers=80), 3)
_BY_16 = _Resident(Stream(128, 16, 4, 2, 4, False, registers=80), 3)
_BY_32 = _Resident(Stream(128, 32, 4, 2, 8, False, registers=80), 2)
_BY_64 = (_Resident(Stream(256, 64, 4, 2, 16, False), 1), _Resident(Stream(128, 64, 2, 3, 4, False, registers=128), 2))
_BY_128 = _Resident(Stream(128, 128, 2, 4, 8, True), 1)
# Up to so many pairs of an expert that is chosen: the first and the second product of a mixture.
_BY_EXPERT = (
    (4, (_BY_8, _BY_8)),
    (12, (_BY_16, _BY_16)),
    (24, (_BY_32, _BY_32)),
    (96, _BY_64),
    (inf, (_BY_128, _BY_128)),
)


@lru_cache(maxsize=4096)
def plan_hopper_experts(processors: int, pairs: int, experts: int, *rows: int) -> tuple[Stream, ...]:
    """The launches of the products of a mixture, of so many ``rows`` each; their tiles have one size. As pure."""
    chosen = min(pairs, experts)
    products = next(products for each, products in _BY_EXPERT if pairs <= each * chosen)
    found = []
    for n, (launch, programs) in zip(rows, products, strict=False):
        if launch.block_m == 8 and -(-n // launch.rows) * chosen < programs * processors:
            launch, programs = _BY_FEW
        found.append(replace(launch, programs=programs * processors))
    return tuple(found)


# Shared memory of a multiprocessor that two programs of the kernel for few tokens can have each.
_HALF = SHARED_MEMORY[9, 0] // 2 - 1024
_FEW = 16  # tokens up to which rows.py can serve
_LARGE = 100 << 20  # elements of a weight from which x is read once for 256 rows
# For more than 64 tokens: the more tokens of a tile, the less is decoded for each; the fewer, the more tiles there are.
_MANY = (
    Stream(64, 64, 4, 3, 4, True),
    Stream(64, 128, 4, 3, 4, True),
    Stream(128, 128, 2, 4, 8, True),
    Stream(128, 256, 2, 3, 8, True),
)
# Cycles of a column tile, and of what begins and ends a tile of the output, by its rows and tokens.
_CYCLES = {
    (64, 32): (265, 500), (64, 64): (303, 2600), (64, 128): (392, 4000),
    (128, 32): (400, 1000), (128, 64): (454, 1000), (128, 128): (660, 3700), (128, 256): (1090, 3500),
    (256, 16): (600, 1000), (256, 32): (790, 1000), (256, 64): (990, 2000), (256, 128): (1450, 4000),
}  # fmt: skip
# Cycles of sharing tiles: a second kernel, each part that it waits for, an element of all parts, written and read. And
# the column tiles that it takes where no two programs are at the same columns, so that each reads x by itself.
_SHARING, _WAIT, _OF_A_PART, _ALONE = 1500, 400, 0.0043, 20


@lru_cache(maxsize=4096)
def plan_hopper(processors: int, m: int, n: int, k: int) -> Rows | Stream:
    """Chooses the launch of the Hopper kernels, as pure as `plan_linear`."""
    if m > _FEW or (m > 8 and n * k >= _LARGE):
        return _plan_stream(processors, m, n, k)
    return _plan_rows(processors, m, n, k)


def _plan_rows(processors: int, m: int, n: int, k: int) -> Rows:
    block_m = 8 if m <= 8 else 16
    # 64 rows of a tile are adjacent in memory: the more of them a block has, the better; but every processor wants one
    rows = 64 if n >= 48 * processors and block_m == 8 else 32 if n >= 16 * processors else 16
    k_tiles = -(-k // 64)
    blocks = -(-n // rows)
    # 8 warps of two programs on a multiprocessor, or 16 of one
    choices = ((8, 2, _HALF), (16, 1, SHARED_MEMORY[9, 0]))
    for (warps, per, limit), steps in product(choices if blocks > processors else choices[1:], (2, 1)):
        stages = -(-k_tiles // (warps * steps))
        launch = Rows(rows, block_m, warps, steps, stages, True, min(blocks, processors * per))
        padded = stages * steps * warps - k_tiles >= warps
        if launch.shared_memory <= limit and (steps == 1 or (rows < 64 and not padded)):
            return launch
    rows = min(rows, 32)
    blocks = -(-n // rows)
    if blocks > processors:
        return Rows(rows, block_m, 8, 2, 2, False, min(blocks, 2 * processors))
    return Rows(rows, block_m, 16, 2 if block_m == 8 else 1, 3, False, blocks)


def _plan_stream(processors: int, m: int, n: int, k: int) -> Stream:
    few = m <= 64 or (m <= 128 and n * k >= _LARGE)
    choices = (_few_tokens(processors, m, n, k),) if few else _MANY
    return min((_planned(choice, processors, m, n, -(-k // 64)) for choice in choices), key=lambda pair: pair[0])[1]


def _few_tokens(processors: int, m: int, n: int, k: int) -> Stream:
    """The launch for few tokens, all in one block, before its programs are counted."""
    if m <= _FEW:
        return Stream(256, 16, 4, 3, 8, False)
    block_m = 32 if m <= 32 else 64 if m <= 64 else 128
    if n * k >= _LARGE:
        # four warps a scheduler hide what decoding waits for, and have no registers left to overlap
        return Stream(256, block_m, 4, 2, 16, False)
    if -(-n // 64) <= processors:
        return Stream(64, block_m, 4, 4 if block_m == 32 else 3, 4, True)
    return Stream(128, block_m, 4, 3, 8, True)


def _planned(choice: Stream, processors: int, m: int, n: int, k_tiles: int) -> tuple[float, Stream]:
    """The cycles that a choice takes, and it with its programs."""
    out_tiles = -(-n // choice.rows) * -(-m // choice.block_m)
    waves, rest = divmod(out_tiles, processors)
    each, ends = _CYCLES[choice.rows, choice.block_m]
    last, sharers = _last_wave(choice, each, processors, rest, m, k_tiles)
    cycles = waves * k_tiles * each + last + (waves + (rest > 0)) * ends
    return cycles, replace(choice, programs=processors if waves else max(sharers, out_tiles), sharers=sharers)


def _last_wave(choice: Stream, cycles: int, processors: int, rest: int, m: int, k_tiles: int) -> tuple[float, int]:
    """How long the ``rest`` of the output takes, and the programs that share its k-blocks; 1: none do."""
    if rest == 0:
        return 0, 1
    k_blocks, part = -(-k_tiles // choice.tiles), _OF_A_PART * choice.rows * choice.block_m
    options: list[tuple[float, int]] = [(k_blocks * choice.tiles * cycles, 1)]
    for each in range(2, min(processors // rest, k_blocks) + 1):
        own: float = -(-k_blocks // each) * choice.tiles * cycles
        options.append((own + _SHARING + _WAIT * each + part * rest * each, rest * each))
    if m <= 128 and rest * k_blocks > processors:  # two parts a program
        own = (k_tiles * rest / processors + _ALONE) * cycles
        options.append((own + _SHARING + part * processors, processors))
    return min(options)


def division(launch: Stream, out_tiles: int, k_blocks: int) -> tuple[int, int, int]:
    """How a launch divides the tiles of an output: how many are shared, among how many programs, and of how many.

    The others are taken in turn, whole; a program has its share after them.
    """
    rest = out_tiles % launch.programs
    shared = min(launch.sharers, launch.programs, rest * k_blocks)
    if shared <= rest:
        return 0, 1, min(launch.programs, out_tiles)
    return rest, shared, launch.programs if out_tiles >= launch.programs else shared
