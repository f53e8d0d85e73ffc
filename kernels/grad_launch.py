"""Launch parameters of the gradient of a linear's input: a table by tokens, read by a pure function.

Measured on an H200 (docs/performance.md); the rows of SM80 to SM89 are held by compilation only.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from marlin_w4a16.kernels.target import Target


@dataclass(frozen=True, slots=True)
class GradLaunch:
    """What one launch of the kernel is compiled and started with.

    Attributes:
        block_m, block_k: tokens and columns of a program; columns are a multiple of 64.
        block_n: weight rows of a step, 64 or 128.
        split_n: programs that share a tile of the output, each with its part of n.
        num_warps, num_stages: as Triton takes them.
    """

    block_m: int
    block_k: int
    block_n: int
    split_n: int
    num_warps: int
    num_stages: int


class _Regime(NamedTuple):
    """A row of the table: up to ``tokens``."""

    tokens: int
    launch: GradLaunch
    programs: int  # n is split while all programs of the launch are at most so many a multiprocessor ...
    steps: int  # ... and each keeps at least so many steps of block_n


_HOPPER = (
    _Regime(16, GradLaunch(16, 64, 64, 1, 4, 4), 4, 16),
    _Regime(32, GradLaunch(32, 64, 64, 1, 4, 4), 4, 16),
    _Regime(64, GradLaunch(64, 64, 128, 1, 4, 3), 2, 8),
    _Regime(255, GradLaunch(128, 64, 64, 1, 4, 4), 2, 16),
)
_AMPERE = (
    _Regime(16, GradLaunch(16, 64, 64, 1, 4, 4), 4, 16),
    _Regime(32, GradLaunch(32, 64, 128, 1, 4, 3), 4, 8),
    _Regime(64, GradLaunch(64, 64, 64, 1, 4, 3), 2, 16),
    _Regime(255, GradLaunch(128, 128, 64, 1, 8, 3), 1, 16),
)


def plan_grad_input(target: Target, m: int, n: int, k: int) -> GradLaunch | None:
    """The launch for ``m`` tokens and a weight ``[n, k]``; None for so many that it is written out for cuBLAS.

    Pure: depends on nothing but its arguments, so a captured graph and a later call agree.
    """
    regime = next((r for r in (_HOPPER if target.hopper else _AMPERE) if m <= r.tokens), None)
    if regime is None:
        return None
    launch = regime.launch
    tiles = -(-k // launch.block_k) * -(-m // launch.block_m)
    steps = -(-n // launch.block_n)
    split = 1
    while tiles * split * 2 <= target.processors * regime.programs and steps >= split * 2 * regime.steps:
        split *= 2
    return replace(launch, split_n=split)
