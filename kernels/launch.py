"""Launch parameters of the linear kernels: tables by regime, read by pure functions.

Measured on an H200 (docs/performance.md); the rows of SM80 to SM89 are held by compilation only.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from marlin_w4a16.kernels.target import SHARED_MEMORY, Target

DENSE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Launch:
    """What one launch of the linear kernel is compiled and started with.

    Attributes:
        block_n: weight rows of a program, a multiple of 64.
        block_m: tokens of a program.
        block_k: columns of a step, a multiple of 64.
        split_k: programs that share a tile of the output, each with its part of k.
        num_warps, num_stages: as Triton takes them.
    """

    block_n: int
    block_m: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class Rows:
    """What one launch of the kernel for few tokens (rows.py) is compiled and started with.

    Attributes:
        rows: weight rows of a block: 16, 32 or 64.
        block_m: tokens of a program: 8 or 16, no fewer than there are.
        num_warps: warps that share out the columns, 64 each a step.
        steps: steps whose tiles are loaded ahead.
        stages: parts of x in shared memory, each ``64 * num_warps * steps`` columns.
        resident: whether these parts are all of x; otherwise they are a ring.
        programs: programs that take the blocks in turn.
    """

    rows: int
    block_m: int
    num_warps: int
    steps: int
    stages: int
    resident: bool
    programs: int

    @property
    def shared_memory(self) -> int:
        """Bytes: x, and the sums of the warps when a block ends."""
        x = self.stages * self.steps * self.num_warps * self.block_m * 128
        return x + self.num_warps * self.rows * self.block_m * 4 + (0 if self.resident else 8 * self.stages)


@dataclass(frozen=True, slots=True)
class Stream:
    """What one launch of the kernel for more tokens (stream.py) is compiled and started with.

    Attributes:
        rows, block_m: weight rows and tokens of a tile of the output.
        tiles: 64-column tiles of a k-block; an even number where products overlap.
        stages: k-blocks in shared memory.
        num_warps: warps that decode and multiply, beside one that copies.
        overlap: leave a product of wgmma in flight while the next operand is decoded. It takes registers: where they
            are too few, ptxas waits for every single instruction (advisory C7511).
        programs: programs, which take the tiles of the output in turn.
        sharers: programs that share out the k-blocks of a last wave that is too small for all; 1: it is not shared.
        registers: of a lane, all warps together, so that several programs fit on a multiprocessor; None: one does.
    """

    rows: int
    block_m: int
    tiles: int
    stages: int
    num_warps: int
    overlap: bool
    programs: int = 1
    sharers: int = 1
    registers: int | None = None

    @property
    def wgmma(self) -> bool:
        """Whether it multiplies with wgmma; for up to 16 tokens mma.sync is the faster one."""
        return self.block_m > 16

    @property
    def shared_memory(self) -> int:
        """Bytes of codes, scales (16 columns a group) and tokens, the barriers, and of a finished tile on its way."""
        return self.stages * (self.tiles * (self.rows * 36 + self.block_m * 128) + 16) + self.num_warps * 512


@dataclass(frozen=True, slots=True)
class _Regime:
    """A row of the table: up to ``tokens``, for weights of at least ``rows`` rows."""

    tokens: int
    rows: int
    launch: Launch
    programs: int  # k is split while all programs of the launch are at most so many a multiprocessor ...
    steps: int  # ... and each keeps at least so many steps of block_k


_ANY = 1 << 62
_HOPPER = (
    _Regime(16, 0, Launch(64, 16, 128, 1, 4, 4), 4, 8),
    _Regime(32, 0, Launch(64, 32, 128, 1, 4, 4), 4, 8),
    _Regime(64, 25600, Launch(128, 64, 64, 1, 4, 4), 1, _ANY),
    _Regime(64, 0, Launch(64, 64, 64, 1, 4, 4), 2, 16),
    _Regime(256, 0, Launch(128, 128, 64, 1, 4, 4), 2, 16),
    _Regime(_ANY, 0, Launch(128, 128, 64, 1, 8, 3), 1, _ANY),
)
_AMPERE = (
    _Regime(16, 0, Launch(64, 16, 128, 1, 4, 4), 4, 8),
    _Regime(32, 0, Launch(64, 32, 64, 1, 4, 4), 4, 16),
    _Regime(64, 0, Launch(64, 64, 64, 1, 4, 3), 2, 16),
    _Regime(_ANY, 0, Launch(128, 128, 64, 1, 8, 3), 1, 16),
)


def plan_linear(target: Target, m: int, n: int, k: int) -> Launch:
    """Chooses the launch for ``m`` tokens and a weight of ``n`` rows and ``k`` columns.

    Pure: depends on nothing but its arguments, so a captured graph and a later call agree.
    """
    table = _HOPPER if target.hopper else _AMPERE
    regime = next(r for r in table if m <= r.tokens and n >= r.rows)
    launch = regime.launch
    tiles = -(-n // launch.block_n) * -(-m // launch.block_m)
    steps = -(-k // launch.block_k)
    split = 1
    while tiles * split * 2 <= target.processors * regime.programs and steps >= split * 2 * regime.steps:
        split *= 2
    return replace(launch, split_k=split)


FEW_PAIRS = 32  # pairs of token and choice up to which each has a tile of its own
_EXPERTS = {16: Launch(64, 16, 128, 1, 4, 4), 32: Launch(64, 32, 128, 1, 4, 4), 64: Launch(64, 64, 64, 1, 4, 4)}
_EXPERTS_MANY = Launch(128, 128, 64, 1, 8, 3)


def plan_experts(pairs: int, experts: int) -> Launch | None:
    """The launch of the products of a mixture; None for so few pairs that none need share a tile."""
    if pairs <= FEW_PAIRS:
        return None
    each = pairs / min(pairs, experts)
    return next((launch for block_m, launch in _EXPERTS.items() if each <= block_m), _EXPERTS_MANY)


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
    (_ANY, (_BY_128, _BY_128)),
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
# For more than 128 tokens: the more tokens, the less is decoded for each; the fewer, the more tiles there are.
_MANY = (Stream(128, 256, 2, 3, 8, True), Stream(128, 128, 2, 4, 8, True), Stream(64, 128, 4, 3, 4, True))
# Cycles of a column tile, and of what begins and ends a tile of the output.
_CYCLES = {(128, 256): (1090, 10000), (128, 128): (670, 5000), (64, 128): (390, 4000)}


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
    choices = (_few_tokens(processors, m, n, k),) if m <= 128 else _MANY
    return min((_planned(choice, processors, m, n, -(-k // 64)) for choice in choices), key=lambda pair: pair[0])[1]


def _few_tokens(processors: int, m: int, n: int, k: int) -> Stream:
    """The launch for up to 128 tokens, all in one block, before its programs are counted."""
    if m <= _FEW:
        return Stream(256, 16, 4, 3, 8, False)
    block_m = 32 if m <= 32 else 64 if m <= 64 else 128
    if n * k >= _LARGE:
        # four warps a scheduler hide what decoding waits for, and have no registers left to overlap
        return Stream(256, block_m, 4, 2, 16, False)
    if -(-n // 64) <= processors:
        return Stream(64, block_m, 4, 4 if block_m == 32 else 3, 4, True)
    return Stream(128, block_m, 4, 3, 8, True) if block_m < 128 else Stream(128, 128, 2, 4, 8, True)


def _planned(choice: Stream, processors: int, m: int, n: int, k_tiles: int) -> tuple[float, Stream]:
    """The cycles that a choice takes, and it with its programs."""
    out_tiles = -(-n // choice.rows) * -(-m // choice.block_m)
    waves, rest = divmod(out_tiles, processors)
    last, sharers = _last_wave(processors, rest, m, k_tiles, choice.tiles)
    each, ends = _CYCLES.get((choice.rows, choice.block_m), (1, 0))
    cycles = (waves * k_tiles + last) * each + (waves + (rest > 0)) * ends
    return cycles, replace(choice, programs=processors if waves else max(sharers, out_tiles), sharers=sharers)


def _last_wave(processors: int, rest: int, m: int, k_tiles: int, tiles: int) -> tuple[float, int]:
    """How many column tiles the ``rest`` of the output takes, and the programs that share its k-blocks; 1: none do."""
    if rest == 0:
        return 0, 1
    k_blocks = -(-k_tiles // tiles)
    options: list[tuple[float, int]] = [(k_blocks * tiles, 1)]
    for each in range(2, min(processors // rest, k_blocks) + 1):
        # parts are written and read, and each is waited for when they are summed
        parts = 4 + 16 * rest * each / processors + 0.7 * each
        options.append((-(-k_blocks // each) * tiles + parts, rest * each))
    if m <= 128 and rest * k_blocks > processors:
        # two parts a program; and no two programs are at the same columns, so each reads x by itself
        options.append((k_tiles * rest / processors + 30, processors))
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


def plan_dense(m: int) -> bool:
    """Whether ``m`` tokens pay for writing the weight out in 16 bits and calling cuBLAS."""
    return m >= DENSE_TOKENS
