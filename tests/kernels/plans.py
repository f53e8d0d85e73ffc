"""The calls whose plans the tests look at, and what they come to on Hopper."""

from dataclasses import replace
from itertools import product

from marlin_w4a16.kernels import grad_launch, hopper_launch
from marlin_w4a16.kernels import launch as tables
from marlin_w4a16.kernels.grad_launch import GradLaunch
from marlin_w4a16.kernels.hopper_launch import plan_hopper
from marlin_w4a16.kernels.launch import Launch, Rows, Stream
from marlin_w4a16.kernels.target import Target

PROCESSORS = 132  # multiprocessors of an H200
TOKENS = [
    1, 2, 3, 7, 8, 9, *range(15, 18), *range(31, 34), *range(63, 66), *range(127, 130), *range(255, 258), 1000, 4096,
]  # fmt: skip
SIZES = [1, 16, 64, 65, 96, 200, 1120, 2048, 2880, 4096, 5120, 8192, 14336, 25599, 25600, 28672, 57344, 151936]


def launches(capability: tuple[int, int]) -> tuple[Launch, ...]:
    """Every launch of the portable kernel in a capability's table, without and with a split."""
    table = tables._HOPPER if Target(capability, PROCESSORS).hopper else tables._AMPERE
    return tuple(replace(r.launch, split_k=s) for r in table for s in (1, 4) if s == 1 or r.steps < tables._ANY)


def grad_launches(capability: tuple[int, int]) -> tuple[GradLaunch, ...]:
    """Every launch of the gradient's kernel in a capability's table, without and with a split."""
    table = grad_launch._HOPPER if Target(capability, PROCESSORS).hopper else grad_launch._AMPERE
    return tuple(replace(r.launch, split_n=s) for r in table for s in (1, 4))


def hopper_expert_launches() -> dict[Stream, int]:
    """Every launch of the products of a mixture, and how many programs of it a multiprocessor holds."""
    return dict((hopper_launch._BY_FEW, *(product for _, products in hopper_launch._BY_EXPERT for product in products)))


def hopper_plans() -> dict[tuple[int, int, int], Rows | Stream]:
    return {(m, n, k): plan_hopper(PROCESSORS, m, n, k) for n, k, m in product(SIZES, SIZES, TOKENS)}


def evenly(launch: Rows | Stream, k: int) -> bool:
    """Whether every warp has a tile of its own in every step, for which the kernel for few tokens is compiled anew."""
    return isinstance(launch, Rows) and -(-k // 64) % (launch.num_warps * launch.steps) == 0


def once(launch: Rows | Stream) -> Rows | Stream:
    """The launch with one program: what the compiled kernel depends on."""
    return replace(launch, programs=1) if isinstance(launch, Rows) else replace(launch, programs=1, sharers=1)


def hopper_launches() -> dict[tuple[Rows | Stream, bool], tuple[int, bool]]:
    """Every launch that is compiled, whatever its programs, and whether `evenly`: a k, and whether two programs share
    a multiprocessor."""
    found = {}
    for (_, _, k), launch in hopper_plans().items():
        kept = once(launch), evenly(launch, k)
        found[kept] = k, launch.programs > PROCESSORS or found.get(kept, (0, False))[1]
    return found


def named(launch: Rows | Stream, *form: object) -> str:
    tile = f"{launch.rows}x{launch.block_m}-{launch.num_warps}warps"
    if isinstance(launch, Rows):
        name = f"rows-{tile}-{launch.steps}x{launch.stages}-{'resident' if launch.resident else 'ring'}"
    else:
        name = f"stream-{tile}-{launch.stages}"
    return "-".join(map(str, (name, *form)))
