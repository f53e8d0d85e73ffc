"""Near misses of FP4 linears by seed: a written form, at most one mutation, and inputs that show every element."""

from random import Random

import torch
from torch import Tensor

from attacks import products, states, tensors
from attacks.case import Case, Mutation, seeded
from attacks.settings import SETTINGS, setting_of
from programs.codes import (
    ARRANGEMENTS,
    bits_of_bfloat16,
    bits_of_float16,
    float_arithmetic,
    literal_table,
    nested_where,
)
from programs.composed import ORDERS, SCALES, Composed
from programs.hand import FORMS
from programs.program import Program
from programs.written import K, Written, by_table

ROWS = 64  # as many as columns: the first input is the identity, and a weight multiplied the wrong way runs too
BLOCK = 16  # that share a graph
VALUES = (*[by_table] * 8, *[literal_table] * 4, bits_of_bfloat16, bits_of_float16, float_arithmetic, nested_where)
NEAR: list[Mutation] = [*tensors.NEAR, *products.NEAR, *states.NEAR]
TRUE: list[Mutation] = [Mutation("none", harmless=True), *tensors.TRUE, *products.TRUE]
MUTATIONS = {mutation.name: mutation for mutation in (*NEAR, *TRUE)}
SAID = [form for form in FORMS if form.outcome == "replaced" and form.section != "sharing"]


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
    return _drawn(random)


def _drawn(random: Random) -> Composed:
    kind = random.choice(list(SCALES))
    held, scale = random.choice(SCALES[kind])
    arrangement, values, order = random.choice(list(ARRANGEMENTS)), random.choice(VALUES), random.choice(ORDERS)
    flags = {name: random.random() < 0.3 for name in ("transposed", "in_place", "matmul")}
    dtype = random.choice([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    sizes = {"group": random.choice([16, 32]), "n": random.choice([16, 32, 48, 64, 64])}
    return Composed(kind, held, scale, arrangement, values, order, dtype=dtype, **sizes, **flags)


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
