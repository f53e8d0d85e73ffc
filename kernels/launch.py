"""Launch parameters of the linear kernels: tables by regime, read by pure functions.

Measured on an H200 (docs/performance.md); the rows of SM80 to SM89 are held by compilation only.
"""

from dataclasses import dataclass, replace

from marlin_w4a16.kernels.target import Target

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


def plan_dense(m: int) -> bool:
    """Whether ``m`` tokens pay for writing the weight out in 16 bits and calling cuBLAS."""
    return m >= DENSE_TOKENS
