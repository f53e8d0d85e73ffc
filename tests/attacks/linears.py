"""Near misses of FP4 linears by seed: a written form, at most one mutation, and inputs that show every element."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from attacks import products, states, tensors
from attacks.case import Case, Mutation, seeded
from attacks.settings import SETTINGS, setting_of
from marlin_w4a16 import FP4Weight
from programs.codes import (
    ARRANGEMENTS,
    bits_of_bfloat16,
    bits_of_float16,
    float_arithmetic,
    literal_table,
    nested_where,
)
from programs.hand import FORMS
from programs.program import Program
from programs.scales import bits_of_e4m3, exp2, held_as, ldexp, plain, power, shift
from programs.written import FLOAT8, K, Written, by_groups, by_table, checkpoint, elements, float8

ROWS = 64  # as many as columns: the first input is the identity, and a weight multiplied the wrong way runs too
BLOCK = 16  # that share a graph
VALUES = (*[by_table] * 8, *[literal_table] * 4, bits_of_bfloat16, bits_of_float16, float_arithmetic, nested_where)
SCALES: dict[str, list[tuple[torch.dtype | None, Callable[[Written], Tensor]]]] = {
    "e4m3": [
        (None, float8),
        (None, bits_of_e4m3),
        (torch.float8_e4m3fn, plain),
        (torch.float32, plain),
        (torch.bfloat16, plain),
        (torch.float16, plain),
    ],
    "e8m0": [
        (None, float8),
        (None, exp2),
        (None, power),
        (None, ldexp),
        (None, shift),
        (torch.float8_e8m0fnu, plain),
        (torch.float32, plain),
    ],
}
ORDERS = ("none", "folded", "scales", "codes", "weight", "divisor", "float")
NEAR: list[Mutation] = [*tensors.NEAR, *products.NEAR, *states.NEAR]
TRUE: list[Mutation] = [Mutation("none", harmless=True), *tensors.TRUE, *products.TRUE]
MUTATIONS = {mutation.name: mutation for mutation in (*NEAR, *TRUE)}
SAID = [form for form in FORMS if form.outcome == "replaced" and form.section != "sharing"]


@dataclass(frozen=True)
class Composed:
    """A way to write an FP4 linear, drawn part by part."""

    kind: str
    held: torch.dtype | None
    scale: Callable[[Written], Tensor]
    arrangement: str
    values: Callable[[Written], Tensor]
    order: str
    group: int
    n: int
    transposed: bool
    in_place: bool
    dtype: torch.dtype
    matmul: bool

    @classmethod
    def drawn(cls, random: Random) -> "Composed":
        kind = random.choice(["e4m3", "e8m0"])
        held, scale = random.choice(SCALES[kind])
        arrangement, values, order = random.choice(list(ARRANGEMENTS)), random.choice(VALUES), random.choice(ORDERS)
        flags = {name: random.random() < 0.3 for name in ("transposed", "in_place", "matmul")}
        dtype = random.choice([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16])
        sizes = {"group": random.choice([16, 32]), "n": random.choice([16, 32, 48, 64, 64])}
        return cls(kind, held, scale, arrangement, values, order, dtype=dtype, **sizes, **flags)

    def __str__(self) -> str:
        ways = [name for name in ("transposed", "in_place", "matmul") if getattr(self, name)]
        held = str(self.held or torch.uint8).removeprefix("torch.")
        said = self.kind, self.group, held, self.arrangement, self.values.__name__, self.order, *ways
        return f"composed {' / '.join(map(str, said))} {str(self.dtype).removeprefix('torch.')}"

    def build(self) -> Written:
        fp4 = checkpoint(self.kind, self.group, self.n, K, "none" if self.order == "none" else "general")
        parts = {"store": self._store, "unpack": self._unpack, "values": self._values, "scale": self._scale}
        return Written(fp4, self.dtype, decode=self._decode, multiply=self._multiply, **parts)

    def _store(self, fp4: FP4Weight) -> dict[str, Any]:
        codes = ARRANGEMENTS[self.arrangement].pack(elements(fp4), fp4.group)
        scales = fp4.scales if self.held is None else held_as(self.held, fp4)["scales"]
        factor = fp4.multiplier[:1].clone()
        if self.order == "folded":
            scales = fp4.scales.view(FLOAT8[self.kind]).float() * factor
        if self.transposed:
            codes, scales = codes.t().contiguous(), scales.t().contiguous()
        factor = 1 / factor if self.order == "divisor" else factor
        return {"codes": codes, "scales": scales, "factor": factor.item() if self.order == "float" else factor}

    def _unpack(self, m: Written) -> Tensor:
        return ARRANGEMENTS[self.arrangement].unpack(m.codes.t() if self.transposed else m.codes, self.group)

    def _values(self, m: Written) -> Tensor:
        return self.values(m) * m.factor if self.order == "codes" else self.values(m)

    def _scale(self, m: Written) -> Tensor:
        scales = m.scales if self.order == "folded" else self.scale(m)
        scales = scales.t() if self.transposed else scales
        if self.order in ("scales", "float"):
            return scales * m.factor
        return scales / m.factor if self.order == "divisor" else scales

    def _decode(self, m: Written) -> Tensor:
        values, scales = m.values(m), m.scale(m)
        if self.in_place:
            weight = torch.empty(self.n, K)
            weight.copy_(values).view(self.n, scales.shape[1], -1).mul_(scales.unsqueeze(-1))
        else:
            weight = by_groups(values, scales)
        return (weight * m.factor if self.order == "weight" else weight).to(self.dtype)

    def _multiply(self, m: Written, weight: Tensor, x: Tensor) -> Tensor:
        return x @ weight.T if self.matmul else linear(x, weight)


def generate(seed: int, mutated: bool = True) -> Case:
    """The near miss, or true program, of a seed; without its mutation if not ``mutated``."""
    random, block = Random(f"linear {seed}"), Random(f"linears {seed // BLOCK}")
    setting, alike = setting_of(block), block.random() < 0.3
    mutation = random.choice(TRUE if random.random() < 0.15 else NEAR)
    form = _form(block if alike else random, mutation)
    seeded(seed)
    module, given = (form.build(), ()) if isinstance(form, Composed) else form.build()
    if not isinstance(module, Written):  # several in one: there is no place to change
        mutation, given = TRUE[0], given
    else:
        module.spot = random.randrange(1 << 16)
        if mutated:
            mutate(module, mutation)
    calls = tuple(SETTINGS[setting].prepared(call) for call in _calls(form, given))
    then = mutation.then if mutated else None
    kind = "true" if mutation.harmless else "near"
    return Case(seed, str(form), mutation.name, kind, module, calls, then, setting, mutation.rounds)


def mutate(module: Written, mutation: Mutation) -> None:
    """Does it to a linear."""
    if mutation.prepare is not None:
        mutation.prepare(module)
    if mutation.change is None:
        return
    change, inner = mutation.change, getattr(module, mutation.place)
    if mutation.place == "multiply":
        module.multiply = lambda m, weight, *xs: change(m, inner, weight, *xs)
    else:
        setattr(module, mutation.place, lambda m: change(m, inner(m)))


def _form(random: Random, mutation: Mutation) -> Composed | Program:
    """One in which the mutation finds its place."""
    any_form = mutation.place in ("", "decode") and mutation.prepare is None
    if mutation.harmless or any_form:
        form = random.choice(SAID) if random.random() < 0.4 else None
        if form is not None:
            return form
    return Composed.drawn(random)


def _calls(form: Composed | Program, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Inputs of one shape: the identity, ordinary ones, large ones whose sum is negative, tiny ones."""
    if isinstance(form, Program) and not (len(given) == 1 and given[0].shape == (3, K)):
        drawn = [
            tuple(torch.randn(x.shape).to(x.dtype) if x.is_floating_point() else x for x in given) for _ in range(2)
        ]
        return [given, *drawn]
    dtype = form.dtype
    large = 1e3 if dtype != torch.float16 else 16.0
    first, second = torch.eye(ROWS, K, dtype=dtype), 3 * torch.randn(ROWS, K)
    third = -large * torch.randn(ROWS, K).abs()
    if dtype == torch.float32:
        third[ROWS - 1, 0], third[ROWS - 2, 1] = torch.inf, torch.nan
    return [(first,), (second.to(dtype),), (third.to(dtype),)]
