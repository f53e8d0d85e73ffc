"""A few near misses of each kind: what is replaced computes what it did. ``make attack`` runs many."""

import pytest
import torch
from torch import nn

from attacks import linears, mixtures
from attacks.case import Case
from attacks.compare import compare
from attacks.run import Bundle, eager, judge, run
from narrow import case

COUNTS = {linears: (64, 64), mixtures: (24, 60)}  # in all runs, and with --wide
BLOCKS = [
    case(generator, first, narrow=first < narrow, id=f"{generator.__name__.rpartition('.')[2]}-{first}")
    for generator, (narrow, wide) in COUNTS.items()
    for first in range(0, wide, generator.BLOCK)
]


def _id(value):
    return value.__name__.rpartition(".")[2]


@pytest.mark.parametrize("generator, first", BLOCKS)
def test_nothing_that_is_replaced_is_wrong(generator, first):
    results = judge([generator.generate(seed) for seed in range(first, first + generator.BLOCK)])
    wrong = [result for result in results if result.outcome == "wrong"]
    assert not wrong, "\n".join(f"{r.mutation} (seed {r.seed}), {r.form}: {r.detail}" for r in wrong)


@pytest.mark.parametrize("generator", [linears, mixtures], ids=_id)
def test_near_misses_are_none_of_the_unmutated(generator):
    """Their inputs show what was done to most of them."""
    shown = [shows(generator, seed) for seed in range(50)]
    shown = [one for one in shown if one is not None]
    assert sum(shown) >= 0.7 * len(shown)


def shows(generator, seed):
    """Whether eager tells a near miss from the same without its mutation; None of others."""
    near, true = generator.generate(seed), generator.generate(seed, mutated=False)
    some, others = eager(near), eager(true)
    if near.kind == "true" or some is None or others is None:
        return None
    results = [[[call[0]] for call in calls] for calls in (some, others)]
    return compare(*results) is not None


class Scaled(nn.Module):
    """Twice its input, with a gradient that may be another."""

    def __init__(self, gradient: float) -> None:
        super().__init__()
        self.gradient = gradient

    def forward(self, x):
        return self.gradient * x + (2 - self.gradient) * x.detach()


def test_gradients_are_compared():
    x = torch.randn(3, 4)
    cases = [Case(0, "", "", "near", Scaled(by), ((x,),), setting="gradients") for by in (2.0, 1.0)]
    bundles = [Bundle([case]) for case in cases]
    some, others = (run(bundle, bundle, [case])[0] for case, bundle in zip(cases, bundles, strict=True))
    assert compare(some, some) is None
    assert compare(others, some).place == 1


@pytest.mark.parametrize("generator", [linears, mixtures], ids=_id)
def test_a_seed_gives_the_same_again(generator):
    first, second = (generator.generate(17) for _ in range(2))
    assert first.name == second.name
    for a, b in zip(first.calls, second.calls, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    some, others = (run(bundle, bundle, [one])[0] for one in (first, second) for bundle in [Bundle([one])])
    assert compare(some, others) is None


@pytest.mark.parametrize("generator", [linears, mixtures], ids=_id)
def test_names_are_unique(generator):
    assert len(generator.MUTATIONS) == len(generator.NEAR) + len(generator.TRUE)
