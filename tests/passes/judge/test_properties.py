"""Decodes put together at random: each is replaced, and one that is mutated is refused or still right, never wrong."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from programs.backend import through_backend
from programs.codes import (
    ARRANGEMENTS,
    bits_of_bfloat16,
    bits_of_float16,
    float_arithmetic,
    list_of_choices,
    literal_table,
    nested_where,
)
from programs.composed import ORDERS, SCALES, Composed
from programs.written import Written, by_table

SIZE = 64  # a square weight, so that one multiplied the wrong way runs too
LIMITS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}  # relative, of each element of the weight

VALUES = (by_table, literal_table, list_of_choices, nested_where, bits_of_bfloat16, bits_of_float16, float_arithmetic)


def changed(index: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Changes one element of a tensor."""

    def mutate(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = change(t[index])
        return t

    return mutate


# What happens to an intermediate value, by the part of a `Written` where it happens. Some give other FP4 weights.
MUTATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a wrong entry in the table": ("values", lambda v: torch.where(v == 3, 3.5, v)),
    "two entries exchanged": ("values", lambda v: torch.where(v == 3, 4.0, torch.where(v == 4, 3.0, v))),
    "nibbles exchanged": ("values", lambda v: v.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)),
    "one code": ("values", changed((3, 17), lambda v: v + 0.25)),
    "one sign": ("values", changed((3, 17), lambda v: -v)),
    "a scale nudged": ("scale", changed((5, 1), lambda s: s * 1.125)),
    "a scale nudged a little": ("scale", changed((5, 1), lambda s: s * (1 + 2.0**-12))),
    "a scale of zero": ("scale", changed((5, 1), torch.zeros_like)),
    "scales rolled along groups": ("scale", lambda s: s.roll(1, -1)),
    "scales rolled along rows": ("scale", lambda s: s.roll(1, 0)),
    "groups twice as long": ("scale", lambda s: s[:, : s.shape[1] // 2]),
    "one element": ("decode", changed((SIZE - 1, 3), lambda w: w + 1)),
    "rows rolled": ("decode", lambda w: w.roll(1, 0)), "columns rolled": ("decode", lambda w: w.roll(1, 1)),
    "a column doubled": ("decode", lambda w: w * torch.ones(SIZE).index_fill(0, torch.tensor(7), 2.0).to(w.dtype)),
    "a row times three": ("decode", lambda w: torch.cat((w[:1] * 3, w[1:]))),
    "a constant": ("decode", lambda w: w + 0.01), "a factor": ("decode", lambda w: w * 1.01),
    "sign": ("decode", torch.neg), "abs": ("decode", torch.abs), "clamp": ("decode", lambda w: w.clamp(-1, 1)),
    "rounded": ("decode", lambda w: w.bfloat16().to(w.dtype)), "transposed": ("decode", Tensor.t),
    "a row of zeros": ("decode", lambda w: torch.cat((w[1:], torch.zeros_like(w[:1])))),
}  # fmt: skip


def built(composition: Composed, seed: int, mutation: str | None = None) -> Written:
    torch.manual_seed(seed)
    module = composition.build()
    if mutation is not None:
        place, mutate = MUTATIONS[mutation]
        inner = getattr(module, place)
        setattr(module, place, lambda m: mutate(inner(m)))
    return module


def composed(kind: str) -> st.SearchStrategy[Composed]:
    return st.builds(
        lambda held, **parts: Composed(kind, *held, n=SIZE, **parts), held=st.sampled_from(SCALES[kind]),
        arrangement=st.sampled_from(list(ARRANGEMENTS)), values=st.sampled_from(VALUES),
        order=st.sampled_from(ORDERS), group=st.sampled_from([16, 32]), transposed=st.booleans(),
        in_place=st.booleans(), dtype=st.sampled_from(list(LIMITS)), matmul=st.booleans(),
    )  # fmt: skip


COMPOSED = st.sampled_from(["e4m3", "e8m0"]).flatmap(composed)
SEEDS = st.integers(0, 2**31)
# Each example is traced, so one that fails is not shrunk: that would take minutes.
RUN = settings(deadline=None, derandomize=True, phases=[Phase.generate])


def assert_elements_near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype or expected.dtype == torch.float64
    limit = LIMITS[found.dtype] * expected.double().abs()
    assert bool(((found.double() - expected.double()).abs() <= limit).all())


def columns(dtype: torch.dtype) -> tuple[Tensor]:
    """The input whose product with a weight is the weight itself, transposed: no sum hides an element."""
    return (torch.eye(SIZE, dtype=dtype),)


def assert_replaced_and_right(composition, seed):
    module, inputs = built(composition, seed), columns(composition.dtype)
    found, line = through_backend(module, inputs)
    assert line.startswith("replaced 1 of 1 FP4 linears"), line
    assert_elements_near(found, module(*inputs))
    assert_elements_near(found, module.exact().t())


def assert_refused_or_right(mutation, composition, seed):
    module, inputs = built(composition, seed, mutation), columns(composition.dtype)
    found, _ = through_backend(module, inputs)
    assert_elements_near(found, module(*inputs))


@settings(RUN, max_examples=20)
@given(COMPOSED, SEEDS)
def test_every_composition_is_replaced_and_right(composition, seed):
    assert_replaced_and_right(composition, seed)


@pytest.mark.wide
@settings(RUN, max_examples=60)
@given(COMPOSED, SEEDS)
def test_more_compositions_are_replaced_and_right(composition, seed):
    assert_replaced_and_right(composition, seed)


@pytest.mark.parametrize("mutation", MUTATIONS)
@settings(RUN, max_examples=2)
@given(composition=COMPOSED, seed=SEEDS)
def test_a_mutation_is_refused_or_still_right(mutation, composition, seed):
    assert_refused_or_right(mutation, composition, seed)


@pytest.mark.wide
@pytest.mark.parametrize("mutation", MUTATIONS)
@settings(RUN, max_examples=5)
@given(composition=COMPOSED, seed=SEEDS)
def test_more_mutations_are_refused_or_still_right(mutation, composition, seed):
    assert_refused_or_right(mutation, composition, seed)
