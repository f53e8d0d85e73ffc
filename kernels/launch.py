"""Launch parameters of the linear kernels: a table by regime, read by pure functions.

Measured on an H200 (benchmarks/sweep_linear.py); the rows of SM80 to SM89 are held by compilation only.
"""

from dataclasses import dataclass, replace

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


def plan_dense(m: int) -> bool:
    """Whether ``m`` tokens pay for writing the weight out in 16 bits and calling cuBLAS."""
    return m >= DENSE_TOKENS


def launches(capability: tuple[int, int]) -> tuple[Launch, ...]:
    """Every launch of a capability's table, without and with a split."""
    table = _HOPPER if capability >= (9, 0) else _AMPERE
    splits = (1, 4)
    return tuple(replace(r.launch, split_k=s) for r in table for s in splits if s == 1 or r.steps < _ANY)
