"""Numbers that depend on no input: positions and what is made of them, for as many tokens as are read and for all."""

from collections.abc import Sequence
from typing import Any

import torch

from marlin_w4a16.passes.mixture.values import NotUnderstood, Plain

_KNOWN = frozenset({"add", "sub", "rsub", "mul", "floor_divide", "remainder", "neg"})
_DIVISIONS = ("floor_divide", "remainder")
_LARGE = 1 << 20


def of_positions(name: str, args: Sequence[Any], kwargs: object, sized: int, each: int | None) -> Plain | None:
    """What an operation makes of numbers, as they are; None: it is not known.

    Args:
        name: the operation.
        args: `Plain` values and Python's numbers.
        kwargs: any there are, of which none is known.
        sized: so many of the numbers change between calls.
        each: the number of choices, where there may be any number of tokens: then only sums and multiples of positions
            are known for all of them, and what is left of these, or how often, over the number of choices.

    Raises:
        NotUnderstood: it may be something else for more tokens than are read.
    """
    values = [x for x in args if isinstance(x, Plain)]
    orders = {value.order for value in values if value.at.ndim}
    if name not in _KNOWN or len(orders) > 1 or kwargs:
        return None
    fixed = not sized and all(value.fixed for value in values)
    if each is not None and not fixed:
        _same_for_more(name, args, sized, each)
    at = getattr(torch, name)(*(x.at if isinstance(x, Plain) else x for x in args))
    linear = name not in _DIVISIONS and all(value.linear for value in values)
    return Plain(at=at, order=next(iter(orders), None), fixed=fixed, linear=linear)


def _same_for_more(name: str, args: Sequence[Any], sized: int, each: int) -> None:
    """Sums of multiples of positions that are alike for as many tokens as are read are alike for all."""
    first, *others = args
    if sized:
        raise NotUnderstood(f"{name} of positions and a number that changes between calls")
    if name in _DIVISIONS:
        counts = isinstance(first, Plain) and first.linear and not first.fixed
        if not counts or isinstance(others[0], Plain) or others[0] != each:
            raise NotUnderstood(f"{name} of positions by what is not the number of choices")
    if name == "mul" and all(isinstance(x, Plain) and not x.fixed for x in args):
        raise NotUnderstood("mul of positions and positions")
    if name == "mul" and any(_is_large(x) or (isinstance(x, Plain) and x.at.dtype != torch.int64) for x in args):
        raise NotUnderstood("mul of positions that may leave the range of their type")
    if any(isinstance(x, float) or (isinstance(x, Plain) and x.at.is_floating_point()) for x in args):
        raise NotUnderstood(f"{name} of positions and fractions")


def _is_large(x: Any) -> bool:
    """Whether there may be so many tokens that their positions times a number are beyond 64 bits."""
    if isinstance(x, Plain):
        return x.fixed and bool((x.at.abs() > _LARGE).any())
    return bool(abs(x) > _LARGE)
