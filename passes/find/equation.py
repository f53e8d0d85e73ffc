"""A product of an input and a weight as an equation of labelled axes, and what it asks of both."""

import math
import string
from dataclasses import dataclass, replace

from torch import Tensor

_BATCH = string.ascii_uppercase


@dataclass(frozen=True, slots=True)
class Equation:
    """``out = sum(x * weight)`` over the labels that ``out`` lacks, one letter an axis.

    Attributes:
        x, weight, out: the labels of the axes of each tensor.
    """

    x: str
    weight: str
    out: str

    def __str__(self) -> str:
        return f"{self.x},{self.weight}->{self.out}"

    @property
    def rows(self) -> str:
        """The weight's axes that x lacks: together the rows of a matrix."""
        return "".join(label for label in self.weight if label in self.out and label not in self.x)

    @property
    def columns(self) -> str:
        """The axes that are summed over: together the columns of a matrix."""
        return "".join(label for label in self.weight if label in self.x and label not in self.out)

    @property
    def batch(self) -> str:
        """The axes that all three share: there is a matrix for each of their indices."""
        return "".join(label for label in self.weight if label in self.x and label in self.out)

    @property
    def free(self) -> str:
        """The axes of x that stay, beside those of the batch."""
        return "".join(label for label in self.x if label in self.out and label not in self.weight)

    def refusal(self) -> str | None:
        """Why this is no product of x by matrices, or None."""
        if not (self.columns and self.rows):
            return f"{self} is no matrix product"
        if any(len(set(labels)) < len(labels) for labels in (self.x, self.weight, self.out)):
            return f"{self} has an axis twice"
        if set(self.x) - set(self.columns + self.batch + self.free):
            return f"{self} sums x alone"
        if set(self.weight) - set(self.columns + self.batch + self.rows):
            return f"{self} sums the weight alone"
        if set(self.out) != set(self.free + self.batch + self.rows):
            return f"{self} has an axis of neither operand"
        return None


@dataclass(frozen=True, slots=True)
class Matrices:
    """How a weight of any number of axes is seen as matrices below each other.

    Attributes:
        first: axes of which only the first index counts.
        order: the other axes: those of the batch, of the rows, of the columns.
        batch: the number of matrices.
        n, k: rows and columns of each.
        sizes: of the axes of the batch and of the rows.
    """

    first: tuple[int, ...]
    order: tuple[int, ...]
    batch: int
    n: int
    k: int
    sizes: tuple[int, ...] = ()

    def __call__(self, weight: Tensor) -> Tensor:
        """``[batch * n, k]``."""
        for axis in sorted(self.first, reverse=True):
            weight = weight.select(axis, 0)
        return weight.permute(self.order).reshape(self.batch * self.n, self.k)


def matrices(equation: Equation, weight: Tensor) -> tuple[Equation, Matrices]:
    """The matrices of a product, and its equation less the axes of the weight that say nothing.

    Those are axes of size one that no other tensor has, or that are broadcast, and axes along which the weight is
    expanded.
    """
    first = []
    for axis, label in enumerate(equation.weight):
        alone = label not in equation.x and label not in equation.out
        shared = label in equation.x and label in equation.out
        if (weight.shape[axis] == 1 and (alone or shared)) or (shared and weight.stride(axis) == 0):
            first.append(axis)
    kept = [axis for axis in range(weight.ndim) if axis not in first]
    equation = replace(equation, weight="".join(equation.weight[axis] for axis in kept))
    sizes = {label: weight.shape[axis] for label, axis in zip(equation.weight, kept, strict=True)}
    order = tuple(equation.weight.index(label) for label in equation.batch + equation.rows + equation.columns)
    batch, n, k = (math.prod(sizes[x] for x in part) for part in (equation.batch, equation.rows, equation.columns))
    outer = tuple(sizes[label] for label in equation.batch + equation.rows)
    return equation, Matrices(tuple(first), order, batch, n, k, outer)


def linear(x: int, weight: int) -> Equation:
    """``F.linear`` of operands of so many dimensions."""
    free = _BATCH[: x - 1]
    return Equation(f"{free}k", "nk"[-weight:], f"{free}n")


def matmul(x: int, weight: int) -> Equation:
    """``x @ weight``."""
    batch = _BATCH[: max(x, weight, 2) - 2]
    return Equation(_aligned(batch, x, "mk"), _aligned(batch, weight, "kn"), batch + "m" * (x > 1) + "n" * (weight > 1))


def matmul_left(x: int, weight: int) -> Equation:
    """``weight @ x``."""
    batch = _BATCH[: max(x, weight, 2) - 2]
    return Equation(_aligned(batch, x, "km"), _aligned(batch, weight, "nk"), batch + "n" * (weight > 1) + "m" * (x > 1))


def inner(x: int, weight: int) -> Equation:
    """``torch.inner(x, weight)``."""
    free, rows = _BATCH[: x - 1], string.ascii_lowercase[: weight - 1]
    return Equation(f"{free}z", f"{rows}z", free + rows)


def conv1d(x: int, weight: int) -> Equation:
    """``F.conv1d`` with a kernel of one position."""
    return Equation("bkl"[-x:], "nko"[:weight], "bnl"[-x:])


def conv2d(x: int, weight: int) -> Equation:
    """``F.conv2d`` with a kernel of one position."""
    return Equation("bkhw"[-x:], "nkop"[:weight], "bnhw"[-x:])


def tensordot(dims: tuple[list[int], list[int]] | int, x: int, weight: int, x_first: bool) -> Equation | str:
    """What ``torch.tensordot`` was asked for, or why it is not read."""
    first, second = (x, weight) if x_first else (weight, x)
    left, right = list(_BATCH[:first]), list(string.ascii_lowercase[:second])
    pairs = ([*range(first - dims, first)], [*range(dims)]) if isinstance(dims, int) else dims
    if len(pairs) != 2 or len(pairs[0]) != len(pairs[1]):
        return f"dims {dims!r}"
    for a, b in zip(*pairs, strict=True):
        right[b] = left[a]
    summed = [left[a] for a in pairs[0]]
    out = "".join(label for label in left + right if label not in summed)
    operands = "".join(left), "".join(right)
    return Equation(operands[not x_first], operands[x_first], out)


def einsum(spelled: str, x: int, weight: int, x_first: bool) -> Equation | str:
    """What ``torch.einsum`` was asked for, or why it is not read."""
    terms, arrow, out = spelled.replace(" ", "").partition("->")
    operands = terms.split(",")
    if len(operands) != 2:
        return f"{spelled!r} has {len(operands)} operands, expected 2"
    left, right = operands if x_first else reversed(operands)
    unused = [label for label in string.ascii_letters if label not in spelled]
    spread = "".join(unused[: x - len(left.replace("...", ""))]) if "..." in left else ""
    if not arrow:
        named = left + right
        out = "..." + "".join(sorted(label for label in set(named) - {"."} if named.count(label) == 1))
    found = Equation(left.replace("...", spread), right.replace("...", ""), out.replace("...", spread))
    if (len(found.x), len(found.weight)) != (x, weight):
        return f"{spelled!r} does not name the axes of operands of {x} and {weight} dimensions"
    return found


def _aligned(batch: str, dims: int, axes: str) -> str:
    """The labels of an operand of a matmul: its axes of the matrix behind the batch axes that it has."""
    return "k" if dims == 1 else batch[len(batch) - (dims - 2) :] + axes
