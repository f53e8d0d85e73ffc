"""What each process does of an attack."""

import logging
import signal
from collections.abc import Iterator
from itertools import groupby

import torch

from attacks import linears, mixtures
from attacks.run import Result, judge

KINDS = {"linears": linears, "mixtures": mixtures}


def blocks(kind: str, first: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """The seeds that share a graph."""
    for _, seeds in groupby(range(first, first + count), lambda seed: seed // KINDS[kind].BLOCK):
        yield kind, list(seeds)


def attack(block: tuple[str, list[int]]) -> tuple[str, list[Result]]:
    """Runs the programs of some seeds."""
    kind, seeds = block
    return kind, judge([KINDS[kind].generate(seed) for seed in seeds])


def quiet() -> None:
    """One thread, no word of what is replaced, and an interruption is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    logging.getLogger("marlin_w4a16").setLevel(logging.CRITICAL)
