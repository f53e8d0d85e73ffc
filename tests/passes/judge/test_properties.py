"""Decodes put together at random: each is replaced, and one that is mutated is refused or still right, never wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from marlin_w4a16 import FP4Weight
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
from programs.scales import bits_of_e4m3, exp2, held_as, ldexp, plain, power, shift
from programs.written import Written, by_groups, by_table, checkpoint, elements, float8

SIZE = 64  # a square weight, so that one multiplied the wrong way runs too
LIMITS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}  # relative, of each element of the weight

VALUES = (by_table, literal_table, list_of_choices, nested_where, bits_of_bfloat16, bits_of_float16, float_arithmetic)
# How scales are held and read, by the kind of scale.
SCALES = {
    "e4m3": {
        "uint8": (None, float8),
        "bits": (None, bits_of_e4m3),
        "float8": (torch.float8_e4m3fn, plain),
        "float32": (torch.float32, plain),
        "bfloat16": (torch.bfloat16, plain),
        "float16": (torch.float16, plain),
    },
    "e8m0": {
        "uint8": (None, float8),
        "exp2": (None, exp2),
        "power": (None, power),
        "ldexp": (None, ldexp),
        "shift": (None, shift),
        "float8": (torch.float8_e8m0fnu, plain),
        "float32": (torch.float32, plain),
        "bfloat16": (torch.bfloat16, plain),
    },
}
# Where the global scale enters.
ORDERS = ("none", "folded", "scales", "codes", "weight", "divisor", "float")


def changed(index: tuple[int, int], change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Changes one element of a tensor."""

    def mutate(t: Tensor) -> Tensor:
        t = t.clone()
        t[index] = change(t[index])
        return t

    return mutate


# What happens to an intermediate value, by the place in `Composed` where it happens. Some give other FP4 weights.
MUTATIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a wrong entry in the table": ("values", lambda v: torch.where(v == 3, 3.5, v)),
    "two entries exchanged": ("values", lambda v: torch.where(v == 3, 4.0, torch.where(v == 4, 3.0, v))),
    "nibbles exchanged": ("values", lambda v: v.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)),
    "one code": ("values", changed((3, 17), lambda v: v + 0.25)),
    "one sign": ("values", changed((3, 17), lambda v: -v)),
    "a scale nudged": ("scales", changed((5, 1), lambda s: s * 1.125)),
    "a scale nudged a little": ("scales", changed((5, 1), lambda s: s * (1 + 2.0**-12))),
    "a scale of zero": ("scales", changed((5, 1), torch.zeros_like)),
    "scales rolled along groups": ("scales", lambda s: s.roll(1, -1)),
    "scales rolled along rows": ("scales", lambda s: s.roll(1, 0)),
    "groups twice as long": ("scales", lambda s: s[:, : s.shape[1] // 2]),
    "one element": ("weight", changed((SIZE - 1, 3), lambda w: w + 1)),
    "rows rolled": ("weight", lambda w: w.roll(1, 0)), "columns rolled": ("weight", lambda w: w.roll(1, 1)),
    "a column doubled": ("weight", lambda w: w * torch.ones(SIZE).index_fill(0, torch.tensor(7), 2.0).to(w.dtype)),
    "a row times three": ("weight", lambda w: torch.cat((w[:1] * 3, w[1:]))),
    "a constant": ("weight", lambda w: w + 0.01), "a factor": ("weight", lambda w: w * 1.01),
    "sign": ("weight", torch.neg), "abs": ("weight", torch.abs), "clamp": ("weight", lambda w: w.clamp(-1, 1)),
    "rounded": ("weight", lambda w: w.bfloat16().to(w.dtype)), "transposed": ("weight", Tensor.t),
    "a row of zeros": ("weight", lambda w: torch.cat((w[1:], torch.zeros_like(w[:1])))),
}  # fmt: skip


@dataclass(frozen=True)
class Composed:
    """A way to write the decode of a square weight."""

    kind: str
    held: str
    arrangement: str
    values: Callable[[Written], Tensor]
    order: str
    group: int
    transposed: bool
    in_place: bool
    dtype: torch.dtype
    matmul: bool
    mutation: str | None = None

    def build(self, seed: int) -> Written:
        torch.manual_seed(seed)
        fp4 = checkpoint(self.kind, self.group, SIZE, SIZE, "none" if self.order == "none" else "general")
        parts = {"store": self._store, "unpack": self._unpack, "values": self._values, "scale": self._scale}
        return Written(fp4, self.dtype, decode=self._decode, multiply=self._multiply, **parts)

    def _store(self, fp4: FP4Weight) -> dict:
        codes = ARRANGEMENTS[self.arrangement].pack(elements(fp4), fp4.group)
        dtype, _ = SCALES[self.kind][self.held]
        scales = fp4.scales if dtype is None else held_as(dtype, fp4)["scales"]
        factor = fp4.multiplier[:1].clone()
        if self.order == "folded":
            scales = fp4.scales.view(torch.float8_e4m3fn if self.kind == "e4m3" else torch.float8_e8m0fnu).float()
            scales = scales * factor
        if self.transposed:
            codes, scales = codes.t().contiguous(), scales.t().contiguous()
        if self.order == "divisor":
            factor = 1 / factor
        return {"codes": codes, "scales": scales, "factor": factor.item() if self.order == "float" else factor}

    def _unpack(self, m: Written) -> Tensor:
        return ARRANGEMENTS[self.arrangement].unpack(m.codes.t() if self.transposed else m.codes, self.group)

    def _values(self, m: Written) -> Tensor:
        values = self._mutated("values", self.values(m))
        return values * m.factor if self.order == "codes" else values

    def _scale(self, m: Written) -> Tensor:
        scales = m.scales if self.order == "folded" else SCALES[self.kind][self.held][1](m)
        scales = self._mutated("scales", scales.t() if self.transposed else scales)
        if self.order in ("scales", "float"):
            return scales * m.factor
        return scales / m.factor if self.order == "divisor" else scales

    def _decode(self, m: Written) -> Tensor:
        values, scales = m.values(m), m.scale(m)
        if self.in_place:
            weight = torch.empty(SIZE, SIZE)
            weight.copy_(values).view(SIZE, scales.shape[1], -1).mul_(scales.unsqueeze(-1))
        else:
            weight = by_groups(values, scales)
        if self.order == "weight":
            weight = weight * m.factor
        return self._mutated("weight", weight.to(self.dtype))

    def _multiply(self, m: Written, weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight.T if self.matmul else linear(x, weight)

    def _mutated(self, place: str, value: Tensor) -> Tensor:
        where, mutate = MUTATIONS.get(self.mutation, (None, None))
        return mutate(value) if where == place else value


def composed(kind: str) -> st.SearchStrategy[Composed]:
    return st.builds(
        partial(Composed, kind), held=st.sampled_from(list(SCALES[kind])),
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
    module, inputs = composition.build(seed), columns(composition.dtype)
    found, line = through_backend(module, inputs)
    assert line.startswith("replaced 1 of 1 FP4 linears"), line
    assert_elements_near(found, module(*inputs))
    assert_elements_near(found, module.exact().t())


def assert_refused_or_right(mutation, composition, seed):
    module, inputs = replace(composition, mutation=mutation).build(seed), columns(composition.dtype)
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
