"""Launch parameters of the linear kernels: tables by regime, read by pure functions.

Measured on an H200 (docs/performance.md); the rows of SM80 to SM89 are held by compilation only.
"""

from dataclasses import dataclass, replace
from itertools import product

SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
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
        tiles: 64-column tiles of a unit.
        stages: units in shared memory.
        num_warps: warps that decode and multiply, beside one that copies.
        overlap: leave a product of wgmma in flight while the next operand is decoded. It takes registers: where they
            are too few, ptxas waits for every single instruction (advisory C7511).
        programs: programs, each with an equal run of units.
    """

    rows: int
    block_m: int
    tiles: int
    stages: int
    num_warps: int
    overlap: bool
    programs: int

    @property
    def wgmma(self) -> bool:
        """Whether it multiplies with wgmma; for up to 16 tokens mma.sync is the faster one."""
        return self.block_m > 16

    @property
    def shared_memory(self) -> int:
        """Bytes of codes, scales (16 columns a group) and tokens, and the barriers."""
        return self.stages * (self.tiles * (self.rows * 36 + self.block_m * 128) + 16)


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


def plan_linear(capability: tuple[int, int], processors: int, m: int, n: int, k: int) -> Launch:
    """Chooses the launch for ``m`` tokens and a weight of ``n`` rows and ``k`` columns.

    Pure: depends on nothing but its arguments, so a captured graph and a later call agree.
    """
    table = _HOPPER if capability >= (9, 0) else _AMPERE
    regime = next(r for r in table if m <= r.tokens and n >= r.rows)
    launch = regime.launch
    tiles = -(-n // launch.block_n) * -(-m // launch.block_m)
    steps = -(-k // launch.block_k)
    split = 1
    while tiles * split * 2 <= processors * regime.programs and steps >= split * 2 * regime.steps:
        split *= 2
    return replace(launch, split_k=split)


# Shared memory of a multiprocessor that two programs of the kernel for few tokens can have each.
_HALF = (227 << 10) // 2 - 1024
_FEW = 16  # tokens up to which rows.py can serve
# Elements of a weight from which x is read once for 128 and for 256 rows.
_MEDIUM, _LARGE = 40 << 20, 100 << 20


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
    block_m = next(b for b in (16, 32, 64, 128) if b >= min(m, 128))
    # more rows read x less often, fewer leave fewer parts to be summed and more programs something to do
    size, tiles_m = n * k, -(-m // block_m)
    rows = 256 if size >= _LARGE else 128 if size >= _MEDIUM else 64
    if rows == 128 and 64 < m <= 128:
        rows = 64
    if rows == 64 and -(-n // 64) * tiles_m > processors and m > 128:
        rows = 128
    if m > 256 and 4 * -(-n // 256) * tiles_m >= 3 * processors:
        rows = 256
    num_warps = rows // 16 if block_m > 16 or rows < 256 else 8
    overlap = block_m > 16 and rows * block_m < 256 * 128
    stages = 3 if 3 * 4 * (rows * 36 + block_m * 128) < SHARED_MEMORY[9, 0] - 1024 else 2
    return Stream(rows, block_m, 4, stages, num_warps, overlap, runs(processors, -(-n // rows) * tiles_m, -(-k // 256)))


def runs(processors: int, out_tiles: int, units: int) -> int:
    """Programs among which the units of all tiles of the output are shared out evenly."""
    programs = min(out_tiles * units, processors)
    if out_tiles > programs:
        return programs
    return out_tiles * min(units, programs // out_tiles)  # no tile is met by more programs than need be


def plan_dense(m: int) -> bool:
    """Whether ``m`` tokens pay for writing the weight out in 16 bits and calling cuBLAS."""
    return m >= DENSE_TOKENS


def launches(capability: tuple[int, int]) -> tuple[Launch, ...]:
    """Every launch of a capability's table, without and with a split."""
    table = _HOPPER if capability >= (9, 0) else _AMPERE
    splits = (1, 4)
    return tuple(replace(r.launch, split_k=s) for r in table for s in splits if s == 1 or r.steps < _ANY)
