"""Cases that run with --wide alone, and matrices of which a part, the narrow one, runs without."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import product
from typing import Any

import pytest


def case(*values: Any, narrow: bool, id: str | None = None) -> Any:
    """One case, which is marked wide unless it is narrow."""
    return pytest.param(*values, id=id, marks=() if narrow else pytest.mark.wide)


wide = partial(case, narrow=False)


def matrix(narrow: Callable[..., bool], *axes: Iterable[Any]) -> list[Any]:
    """Every combination of the values along axes, or of those of a mapping by name; ``narrow`` is asked with the place
    along each."""
    named = [axis.items() if isinstance(axis, Mapping) else [(value, value) for value in axis] for axis in axes]
    return [
        case(
            *(value for _, (_, value) in found),
            id="-".join(str(name) for _, (name, _) in found),
            narrow=narrow(*(place for place, _ in found)),
        )
        for found in product(*map(enumerate, named))
    ]
