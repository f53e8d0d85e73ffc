"""Judges a weight by its value: is it the decode of FP4 codes and scales among the leaves it was made from?

A hypothesis is one row of each table below; the value that the traced operations computed must equal what a
hypothesis predicts, element by element. Another way to write FP4 is another row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import GROUP_SIZES, SCALE_DTYPES, FP4Weight, ScaleKind, as_bytes, format_name
from marlin_w4a16.passes.outcome import Rejected

# A traced float32 value may differ from the exact one by the roundings of two products in any order.
_FLOAT32_ULPS = 2
_SAMPLE_ROWS = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to read an `FP4Weight` of ``n`` rows and ``k`` columns from the leaves of a weight, by their positions.

    Attributes:
        codes, scales: positions of those leaves.
        storage, nibbles, factor, form: row names of the tables of this file.
        multiplier: position of the leaf of the multiplier, or None.
        kind, group, n, k: as in `FP4Weight`.
        dtype: that of the traced weight.
    """

    codes: int
    scales: int
    multiplier: int | None
    storage: str
    nibbles: str
    factor: str
    form: str
    kind: ScaleKind
    group: int
    n: int
    k: int
    dtype: torch.dtype

    @property
    def format(self) -> str:
        """The name of the format for people."""
        return format_name(self.kind, self.group)

    @property
    def sources(self) -> list[int]:
        """Positions of the leaves that the weight is read from."""
        return [i for i in (self.codes, self.scales, self.multiplier) if i is not None]

    @property
    def reading(self) -> "Recipe":
        """How it is read from its `sources`, wherever those stand."""
        multiplier = None if self.multiplier is None else 2
        dtype = self.dtype if self._rounds_multiplier else torch.float32  # the dtype the multiplier is rounded to
        return replace(self, codes=0, scales=1, multiplier=multiplier, form="exact", dtype=dtype)

    @property
    def _rounds_multiplier(self) -> bool:
        return self.form.startswith("rounded multiplier")

    def read(self, leaves: Sequence[Tensor], name: str, rows: slice = slice(None)) -> FP4Weight:
        """The weight, or a slice of its rows, in canonical form.

        Raises:
            ValueError: the leaves hold no such weight (a NaN scale, a shape that does not fit).
        """
        matrix = STORAGES[self.storage]
        codes = NIBBLES[self.nibbles](matrix(as_bytes(leaves[self.codes]), self.n, self.k // 2)[rows])
        scales = matrix(as_bytes(leaves[self.scales]), self.n, self.k // self.group)[rows]
        factor = torch.ones((), device=codes.device)
        if self.multiplier is not None:
            factor = FACTORS[self.factor](leaves[self.multiplier].detach().to(codes.device, torch.float32))
        if self._rounds_multiplier:
            factor = factor.to(self.dtype).float()
        multiplier = factor.reshape(-1).expand(self.n)[rows].contiguous()
        return FP4Weight(codes.contiguous(), scales.contiguous(), multiplier, self.kind, self.group, name)


def _rows(leaf: Tensor, n: int, columns: int) -> Tensor:
    return leaf.detach().reshape(n, columns)


def _columns(leaf: Tensor, n: int, columns: int) -> Tensor:
    return leaf.detach().reshape(columns, n).t()


# How codes and scales lie in their leaves, whatever their shape says.
STORAGES: dict[str, Callable[[Tensor, int, int], Tensor]] = {"[n, k]": _rows, "[k, n]": _columns}
# Which half of a byte is the even column.
NIBBLES: dict[str, Callable[[Tensor], Tensor]] = {
    "low first": lambda codes: codes,
    "high first": lambda codes: (codes << 4) | (codes >> 4),
}
# How the leaf of a global scale enters.
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {"times": lambda g: g, "divided by": torch.reciprocal}
# What the traced operations round on the way to the weight: code, scale, multiplier, dtype -> float32 value.
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]] = {
    "exact": lambda c, s, m, _: (c * s) * m,
    "rounded scale": lambda c, s, m, dtype: c * (s * m).to(dtype).float(),
    "rounded multiplier": lambda c, s, m, dtype: (c * s) * m.to(dtype).float(),
    "rounded multiplier and scale": lambda c, s, m, dtype: c * (s * m.to(dtype).float()).to(dtype).float(),
    "rounded multiplier and code": lambda c, s, m, dtype: (c * m.to(dtype).float()).to(dtype).float() * s,
}


def recognise(value: Tensor, leaves: Sequence[Tensor], name: str) -> Recipe | Rejected:
    """Finds the recipe by which ``leaves`` decode to ``value`` ``[n, k]``.

    Every hypothesis is tried on a few rows; one that survives is held against the whole weight.
    """
    n, k = value.shape
    finite = bool(value.isfinite().all())
    sample = slice(0, _SAMPLE_ROWS if finite else n)
    reasons: list[str] = []
    tried = 0
    for recipe in _hypotheses(n, k, leaves, value.dtype):
        tried += 1
        try:
            few = recipe.read(leaves, name, sample)
            if not finite or not _equal(few, value[sample], recipe.form):
                continue
            if _equal(recipe.read(leaves, name), value, recipe.form):
                return recipe
        except ValueError as error:
            reasons.append(str(error))
    if not tried:
        return Rejected(f"no leaves of the sizes of FP4 codes [{n}, {k // 2}] and of byte scales in groups of 16 or 32")
    if len(reasons) == tried or (reasons and not finite):
        return Rejected(reasons[0])
    if not finite:
        return Rejected(f"the traced weight holds NaN or Inf in {_short(value.dtype)}")
    return Rejected(f"its value is not the decode of its codes and scales under any of {tried} hypotheses")


def verify(recipe: Recipe, value: Tensor, leaves: Sequence[Tensor], name: str) -> FP4Weight | Rejected:
    """Holds a known recipe against a new value of the weight."""
    try:
        weight = recipe.read(leaves, name)
    except ValueError as error:
        return Rejected(str(error))
    if not bool(value.isfinite().all()) or not _equal(weight, value, recipe.form):
        return Rejected("its value is no longer the decode of its codes and scales")
    return weight


def may_be_fp4(shape: torch.Size, leaves: Sequence[Tensor]) -> bool:
    """Whether leaves could hold the codes of a weight of this shape: cheap, before anything is evaluated."""
    return len(shape) == 2 and any(_is_bytes(t) and t.numel() * 2 == shape.numel() for t in leaves)


def _hypotheses(n: int, k: int, leaves: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Recipe]:
    factors: list[tuple[int | None, str]] = [(None, "times")]
    for i, leaf in enumerate(leaves):
        if leaf.is_floating_point() and leaf.element_size() > 1 and leaf.numel() in (1, n):
            factors += [(i, factor) for factor in FACTORS]
    factors.reverse()  # a global scale that is there is likely to be used
    forms = ["exact"] if dtype == torch.float32 else list(FORMS)
    for codes, scales in product(range(len(leaves)), repeat=2):
        if codes == scales or not _is_bytes(leaves[codes]) or leaves[codes].numel() * 2 != n * k:
            continue
        for group in GROUP_SIZES:
            if k % group or not _is_bytes(leaves[scales]) or leaves[scales].numel() * group != n * k:
                continue
            named = SCALE_DTYPES.get(leaves[scales].dtype)
            usual: tuple[ScaleKind, ...] = ("e4m3", "e8m0") if group == 16 else ("e8m0", "e4m3")  # where both are true
            kinds = (named,) if named else usual
            for kind, storage, nibbles, form, (multiplier, factor) in product(kinds, STORAGES, NIBBLES, forms, factors):
                if multiplier is not None or form == "exact":
                    yield Recipe(codes, scales, multiplier, storage, nibbles, factor, form, kind, group, n, k, dtype)


def _equal(weight: FP4Weight, value: Tensor, form: str) -> bool:
    """Whether ``value`` is what a form predicts, rounded to its dtype."""
    for rows, part in weight.row_blocks():
        codes, scales = part.factors(torch.float32)
        predicted = FORMS[form](codes, scales.unsqueeze(-1), part.multiplier[:, None, None], value.dtype).flatten(1)
        infinity = torch.full_like(predicted, torch.inf)
        slack = _FLOAT32_ULPS * (torch.nextafter(predicted.abs(), infinity) - predicted.abs())
        found = value[rows]
        low, high = (predicted - slack).to(value.dtype), (predicted + slack).to(value.dtype)
        if not bool(((low <= found) & (found <= high)).all()):
            return False
    return True


def _is_bytes(leaf: Tensor) -> bool:
    return leaf.element_size() == 1 and leaf.dtype != torch.bool


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
