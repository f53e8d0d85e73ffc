"""Near misses of mixtures of experts by seed: a form, at most one mutation, and inputs that reach it."""

from random import Random

import torch
from torch import Tensor, nn

from attacks import around, between, routing
from attacks.case import Case, Mutation, seeded
from attacks.experts import ACTIVATIONS, FORMS, Experts, Shape
from attacks.real import FAMILIES, Real
from marlin_w4a16 import quantize_mxfp4, quantize_nvfp4

NEAR: list[Mutation] = [*routing.NEAR, *between.NEAR, *around.NEAR]
TRUE: list[Mutation] = [*between.TRUE, *routing.TRUE, *around.TRUE]
OF_GRADIENTS = [mutation for mutation in NEAR if mutation.needs == "gradients"]
MUTATIONS = {mutation.name: mutation for mutation in (*NEAR, *TRUE)}
OUTER = ("tokens", "route", "ids", "out", "")  # what can be done to a class of somebody else
SORTED = ("perm", "perm of weights", "inverse")
BLOCK = 4
SETTINGS_OF = {"plain": 70, "dynamic shapes": 10, "gradients": 12, "autocast": 4, "inference mode": 4}  # per cent


def generate(seed: int, mutated: bool = True) -> Case:
    """The near miss, or true program, of a seed; without its mutation if not ``mutated``."""
    random, block = Random(f"mixture {seed}"), Random(f"mixtures {seed // BLOCK}")
    setting = block.choices(list(SETTINGS_OF), list(SETTINGS_OF.values()))[0]
    tokens = [random.choice([1, 2, 5, 7, 12, 24])] * 5 if setting != "dynamic shapes" else [5, 64, 2, 33, 24]
    cut = setting == "gradients" and random.random() < 0.5
    mutation = random.choice(TRUE if random.random() < 0.15 else OF_GRADIENTS if cut else NEAR)
    alike = block.random() < 0.4
    source = block if alike else random
    seeded(seed)
    if mutation.place in OUTER and not mutation.then and source.random() < 0.15:
        family = source.choice(FAMILIES)
        module: nn.Module = Real(family, source.choice(family.implementations))
        shape = module.shape
    else:
        shape = _shape(source, mutation)
        module = Experts(shape)
    module.special = random.choice([0, shape.experts - 1, random.randrange(shape.experts)])
    if mutated:
        _mutate(module, mutation)
    draw = _Calls(shape, mutation, module.special, random)
    calls = tuple(draw(number, count) for number, count in enumerate(tokens))
    then = mutation.then if mutated else None
    return Case(seed, str(shape), mutation.name, "true" if mutation.harmless else "near", module, calls, then, setting)


def _mutate(module: nn.Module, mutation: Mutation) -> None:
    if mutation.prepare is not None:
        mutation.prepare(module)
    if mutation.change is not None:
        module.changes[mutation.place] = mutation.change


def _shape(random: Random, mutation: Mutation) -> Shape:
    """One in which the mutation finds its place and can be seen."""
    forms = [name for name in FORMS if _fits(name, mutation)]
    experts = random.choice([4, 5, 6, 8, 8, 12, 16, 24, 40])
    chosen = random.randint(1, 4)
    if "choice" in mutation.name or mutation.place == "total":
        chosen = max(chosen, 2)
    elif mutation.place != "ids" and random.random() < 0.04:
        experts = chosen = 1
    dtype = random.choice([torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    activations = [name for name, a in ACTIVATIONS.items() if mutation.place not in ("gate", "up") or a.gated]
    bias = random.random() < 0.3 or mutation.place.startswith("bias")
    sizes = {"hidden": random.choice([32, 64]), "width": random.choice([32, 64, 96])}
    quantize, on_input = random.choice([quantize_nvfp4, quantize_nvfp4, quantize_mxfp4]), random.random() < 0.2
    activation = random.choice(activations)
    return Shape(
        random.choice(forms),
        activation,
        experts,
        chosen,
        **sizes,
        bias=bias,
        on_input=on_input,
        dtype=dtype,
        quantize=quantize,
    )


def _fits(form: str, mutation: Mutation) -> bool:
    if mutation.place in SORTED:
        return form in ("grouped", "added") and not (form == "added" and mutation.place == "inverse")
    if mutation.place == "indices":  # elsewhere they move the rows of all others, which is not kept (docs/design.md)
        return form in ("batched", "einsum")
    if mutation.place == "total":
        return form != "added"
    if mutation.needs in ("sentinels", "negative ids"):
        return form != "dense"
    return True


class _Calls:
    """Draws inputs: what a router gives, then such as no router gives."""

    def __init__(self, shape: Shape, mutation: Mutation, special: int, random: Random) -> None:
        self.shape, self.needs, self.special = shape, mutation.needs, special
        self.logits = shape.form == "dense"
        self.huge = shape.dtype == torch.float32
        self.start = random.randrange(shape.experts)
        self.narrow = random.random() < 0.1

    def __call__(self, number: int, tokens: int) -> tuple[Tensor, ...]:
        scale = (1.0, 30.0, 1e3, 1e6, 1e-3)[number] if self.huge else (1.0, 4.0, 2.0, 8.0, 0.1)[number]
        x = scale * torch.randn(tokens, self.shape.hidden)
        if number == 1:
            x[tokens // 2] = 0.0
        if self.needs == "infinities" and self.huge and number in (1, 3):
            x[0, 0], x[-1, 1] = torch.inf, -torch.inf
        x = x.to(self.shape.dtype)
        if self.logits:
            return x, self._logits(number, tokens).to(self.shape.dtype)
        weights, ids = self._routing(number, tokens)
        return x, weights.to(self.shape.dtype), ids.int() if self.narrow else ids

    def _logits(self, number: int, tokens: int) -> Tensor:
        """Routing weights of all experts, of which the largest are taken; no two of a token are equal."""
        logits = torch.randn(tokens, self.shape.experts)
        if number % 2:
            logits[::2, self.special] = 2.5
            logits[1::3] -= 4
            return logits
        return (2 * logits).softmax(-1)

    def _routing(self, number: int, tokens: int) -> tuple[Tensor, Tensor]:
        experts, k = self.shape.experts, self.shape.chosen
        if number in (0, 4):
            return (2 * torch.randn(tokens, experts)).softmax(-1).topk(k)
        weights = 4 * torch.rand(tokens, k) - 2
        if number == 2:
            ids = ((torch.arange(tokens * k) + self.start) % experts).view(tokens, k)
        else:
            ids = torch.rand(tokens, experts).argsort(1)[:, :k]
            ids[torch.rand(tokens, k) < 0.3] = self.special
            weights[torch.rand(tokens, k) < 0.2] *= 1e-3
            weights[torch.rand(tokens, k) < 0.2] = 0.0
        return self._beyond(weights, ids) if number else (weights, ids)

    def _beyond(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """With ids that there are not."""
        at = torch.rand(ids.shape) < 0.3
        if self.needs == "sentinels":
            ids = torch.where(at, self.shape.experts, ids)
        elif self.needs == "negative ids":
            ids = torch.where(at, ids - self.shape.experts, ids)
        return weights, ids
