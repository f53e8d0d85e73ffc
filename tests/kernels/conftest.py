from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kernels.interpreter import Interpreter
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.scale_bytes import ScaleKind


def draw_weight(
    n: int,
    k: int,
    kind: ScaleKind = "e4m3",
    group: int = 16,
    *,
    lead: tuple[int, ...] = (),
    e8m0: tuple[int, int] = (104, 140),
    seed: int = 0,
) -> FP4Weight:
    """Any codes, any finite E4M3 bytes or E8M0 bytes of a range (float16's), values of about one."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (*lead, n, k // 2), dtype=torch.uint8, generator=g)
    shape = (*lead, n, k // group)
    if kind == "e8m0":
        scales = torch.randint(e8m0[0], e8m0[1] + 1, shape, dtype=torch.uint8, generator=g)
    else:
        scales = torch.randint(0x7F, shape, generator=g) + 0x80 * torch.randint(2, shape, generator=g)
    weight = FP4Weight(codes, scales.to(torch.uint8), torch.ones(*lead, n), kind, group)
    largest = weight.unscaled(torch.float64).abs().amax(-1).clamp(min=2.0**-120)
    weight.multiplier.copy_(torch.randn(largest.shape, generator=g) / largest)
    return weight


def draw_every_product(kind: ScaleKind = "e4m3", group: int = 16) -> FP4Weight:
    """Every code times every finite scale byte, which stands in every place of a scale word."""
    byte = torch.tensor([b for b in range(255) if kind == "e8m0" or b != 0x7F], dtype=torch.uint8)
    rows = torch.stack((byte, byte.roll(7)), -1).repeat_interleave(8, -1).flatten()
    scales = torch.stack([rows.roll(16 * column) for column in range(64 // group)], -1)
    codes = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], dtype=torch.uint8).repeat(len(rows), 4)
    return FP4Weight(codes, scales, torch.ones(len(rows)), kind, group)


@pytest.fixture(scope="session")
def every_product() -> Callable[..., FP4Weight]:
    return draw_every_product


@pytest.fixture(scope="session")
def random_weight() -> Callable[..., FP4Weight]:
    return draw_weight


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.fixture
def interpret(interpreter: Interpreter) -> Callable[..., list[Any]]:
    """Runs functions of interpreted.py in Triton's interpreter: pairs of a name and arguments."""
    return interpreter.run
