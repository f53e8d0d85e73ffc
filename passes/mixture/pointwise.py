"""Functions of the sums of a first product, element by element, and the points at which they may bend."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from marlin_w4a16.passes.mixture.values import Between, NotUnderstood

Operand = Between | float
_AROUND = (-1.0, 1.0)  # arguments of smooth functions between which they change most
_MOST = 4  # the degree of a polynomial whose roots are looked for

# Smooth ones, whose slope changes around the zero of their argument, and those that are positive everywhere.
_SMOOTH: dict[str, Callable[..., Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "exp": torch.exp,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
}
_POSITIVE = frozenset({"sigmoid", "exp"})
LIMITS = frozenset({"clamp", "clamp_min", "clamp_max", "minimum", "maximum", "hardtanh"})
ARITHMETIC: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "rsub": torch.rsub,
    "mul": torch.mul,
    "div": torch.div,
}
POINTWISE = frozenset({*_SMOOTH, *LIMITS, *ARITHMETIC, "neg", "square", "pow", "reciprocal"})


@dataclass(slots=True)
class Bends:
    """What was met in functions: numbers, and sums at which a limit sets in or a slope changes."""

    numbers: dict[float, None] = field(default_factory=dict)
    points: dict[float, None] = field(default_factory=dict)

    def apply(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Between:
        """What an operation gives of functions and numbers.

        Raises:
            NotUnderstood: it is not known what its result depends on.
        """
        for number in (*args, *kwargs.values()):
            if isinstance(number, int | float) and not isinstance(number, bool):
                self.numbers[float(number)] = None
        if name in LIMITS:
            return self._limited(name, args, kwargs)
        if name in _SMOOTH:
            return self._smooth(name, args, kwargs)
        if name in ("neg", "square", "reciprocal"):
            told: dict[str, tuple[str, tuple[Any, Any]]] = {
                "neg": ("mul", (args[0], -1.0)), "square": ("pow", (args[0], 2)), "reciprocal": ("div", (1.0, args[0])),
            }  # fmt: skip
            name, args = told[name]
        if kwargs:
            raise NotUnderstood(f"{name} with {', '.join(kwargs)}= of {Between.what}")
        return _power(*args) if name == "pow" else _binary(name, *args)

    def _smooth(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Between:
        function, of, rest = _SMOOTH[name], args[0], args[1:]
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        if rest or kwargs.keys() - ({"approximate"} if name == "gelu" else set()) or not isinstance(of, Between):
            raise NotUnderstood(f"{name} with further arguments of {Between.what}")
        self._bends(name, of, 0.0, *_AROUND)
        return replace(
            of, compute=lambda *z: function(of.compute(*z), **kwargs), polynomial=None, positive=name in _POSITIVE
        )

    def _limited(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Between:
        of, low, high = _limits(name, args, kwargs)
        for limit in (low, high):
            if limit is not None:
                self._bends(name, of, limit)
        limits, function = (*of.limits, object()), _limiting(name, low, high)
        return replace(of, compute=lambda *z: function(of.compute(*z)), limits=limits, positive=False)

    def _bends(self, name: str, of: Between, *values: float) -> None:
        """Notes where a polynomial has some values; one that turns, and all that depends on more, is refused."""
        if of.polynomial is None:
            raise NotUnderstood(f"{name} of {Between.what}, more than a polynomial of one sum")
        first, *rest = of.polynomial
        if _roots([place * factor for place, factor in enumerate(rest, 1)] or [0.0]):
            raise NotUnderstood(f"{name} of {Between.what}, a polynomial that turns")
        for value in values:
            self.points |= dict.fromkeys(_roots((first - value, *rest)))


def _limits(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Between, float | None, float | None]:
    """What is limited, and to what, whatever the operation is called."""
    names = {"clamp": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",), "hardtanh": ("min_val", "max_val")}
    if name in ("minimum", "maximum"):
        of, limit = args if isinstance(args[0], Between) else reversed(args)
        low, high = (limit, None) if name == "maximum" else (None, limit)
    else:
        if len(args) > 1 + len(names[name]):
            raise NotUnderstood(f"{name} with further arguments of {Between.what}")
        of, given = args[0], dict(zip(names[name], args[1:], strict=False)) | kwargs
        default = (-1.0, 1.0) if name == "hardtanh" else (None, None)
        low = given.pop("min", given.pop("min_val", default[0]))
        high = given.pop("max", given.pop("max_val", default[1]))
        if given.keys() - {"inplace"}:
            raise NotUnderstood(f"{name} with {', '.join(given)}= of {Between.what}")
    if any(isinstance(limit, Between) for limit in (low, high)):
        raise NotUnderstood(f"{name} of two of {Between.what}")
    return of, low, high


def _limiting(name: str, low: float | None, high: float | None) -> Callable[[Tensor], Tensor]:
    """The operation itself: at its limits, each has slopes of its own."""
    if name == "hardtanh":
        return lambda z: torch.nn.functional.hardtanh(z, low, high)  # type: ignore[arg-type]
    if name in ("minimum", "maximum"):
        function: Callable[..., Tensor] = getattr(torch, name)
        return lambda z: function(z, torch.tensor(low if high is None else high, dtype=z.dtype))
    return lambda z: z.clamp(low, high)


def _power(of: Between, exponent: Any) -> Between:
    if not isinstance(of, Between) or exponent not in (2, 3):
        raise NotUnderstood(f"pow of {Between.what} by what is not 2 or 3")
    found = of.polynomial
    for _ in range(int(exponent) - 1):
        found = found and of.polynomial and _product(found, of.polynomial)
    return replace(of, compute=lambda *z: of.compute(*z) ** exponent, polynomial=found, positive=False)


def _binary(name: str, a: Operand, b: Operand) -> Between:
    function = ARITHMETIC[name]
    if name == "div" and not (isinstance(b, float | int) or b.positive):
        raise NotUnderstood(f"div by {Between.what}, which may be zero")
    if isinstance(a, Between) and isinstance(b, Between):
        return _joined(name, function, a, b)
    polynomial = _polynomial(name, a, b)
    if isinstance(a, Between):
        number = float(b)  # type: ignore[arg-type]
        above = {"add": number >= 0, "sub": number <= 0, "mul": number > 0, "div": number > 0}.get(name, False)
        first = a.compute
        return replace(
            a, compute=lambda *z: function(first(*z), b), polynomial=polynomial, positive=a.positive and above
        )
    assert isinstance(b, Between)
    above, second, first_one = a >= 0 if name == "add" else a > 0 and name in ("mul", "div"), b.compute, torch.tensor(a)
    return replace(
        b,
        compute=lambda *z: function(first_one, second(*z)),
        polynomial=polynomial,
        positive=b.positive and above,
    )


def _joined(name: str, function: Callable[..., Tensor], a: Between, b: Between) -> Between:
    """Of two functions: of the same sums, or of one each."""
    if a.order is not b.order or a.at.shape != b.at.shape or a.biased != b.biased or not torch.equal(a.fate, b.fate):
        raise NotUnderstood(f"{name} of two of {Between.what} of other rows, or of which one has its bias")
    same = [torch.equal(x, y) for x, y in zip(a.labels(), b.labels(), strict=False)]
    if a.other is None and b.other is None:
        if same[0]:
            polynomial, positive = _polynomial(name, a, b), name in ("add", "mul", "div") and a.positive and b.positive
            return replace(
                a, compute=lambda z: function(a.compute(z), b.compute(z)), polynomial=polynomial, positive=positive
            )
        if bool((a.at < b.at).all()):
            low, high, compute = a.at, b.at, lambda x, y: function(a.compute(x), b.compute(y))
        elif bool((a.at > b.at).all()):
            low, high, compute = b.at, a.at, lambda x, y: function(a.compute(y), b.compute(x))
        else:
            raise NotUnderstood(f"{name} of two of {Between.what} in columns that are paired in several ways")
        return replace(a, at=low, other=high, compute=compute, polynomial=None, positive=False)
    if a.other is not None and b.other is not None:
        if all(same):
            return replace(a, compute=lambda x, y: function(a.compute(x, y), b.compute(x, y)), positive=False)
    else:
        return _with_one(name, function, a, b)
    raise NotUnderstood(f"{name} of more than two sums of a row")


def _with_one(name: str, function: Callable[..., Tensor], a: Between, b: Between) -> Between:
    """Of a function of two sums and one of one of them, or the other way around."""
    two, one = (a, b) if a.other is not None else (b, a)
    place = next((i for i, labels in enumerate(two.labels()) if torch.equal(labels, one.at)), None)
    if place is None:
        raise NotUnderstood(f"{name} of more than two sums of a row")
    at = operator.itemgetter(place)

    def compute(*z: Tensor) -> Tensor:
        values = two.compute(*z), one.compute(at(z))
        return function(*(values if two is a else values[::-1]))

    return replace(two, compute=compute, positive=False)


def _polynomial(name: str, a: Operand, b: Operand) -> tuple[float, ...] | None:
    """The coefficients of a sum, a difference or a product of two, or None."""
    left, right = ((x.polynomial if isinstance(x, Between) else (float(x),)) for x in (a, b))
    if left is None or right is None or len({x.limits for x in (a, b) if isinstance(x, Between)}) > 1:
        return None
    if name == "mul":
        return _product(left, right)
    if name == "div":
        return tuple(x / right[0] for x in left) if len(right) == 1 and right[0] else None
    if name == "rsub":
        left, right = right, left
    sign = -1 if name in ("sub", "rsub") else 1
    size = max(len(left), len(right))
    padded = (tuple(x) + (0.0,) * (size - len(x)) for x in (left, right))
    return tuple(x + sign * y for x, y in zip(*padded, strict=True))


def _product(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...] | None:
    found = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] += x * y
    return tuple(found) if len(found) <= _MOST + 1 else None


def _roots(polynomial: Sequence[float]) -> list[float]:
    """The real roots, by the eigenvalues of the companion matrix."""
    scale = max(map(abs, polynomial))
    kept = list(polynomial)
    while kept and abs(kept[-1]) <= 1e-300 * scale:
        kept.pop()
    degree = len(kept) - 1
    if degree < 1:
        return []
    companion = torch.zeros((degree, degree), dtype=torch.float64)
    companion[1:, :-1] = torch.eye(degree - 1, dtype=torch.float64)
    companion[:, -1] = -torch.tensor(kept[:-1], dtype=torch.float64) / kept[-1]
    if not bool(companion.isfinite().all()):
        raise NotUnderstood(f"numbers of {Between.what} that are too large or too small")
    found = torch.linalg.eigvals(companion)
    real = found.real[found.imag.abs() <= 1e-6 * (1 + found.real.abs())]
    return [float(x) for x in real]
