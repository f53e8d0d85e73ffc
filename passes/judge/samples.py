"""What hypotheses say about a few rows of a weight: whatever they read of its decode runs once for all of them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import GROUP_SIZES, FP4Weight
from marlin_w4a16.passes.judge.decode import Decode, Window
from marlin_w4a16.passes.judge.places import codes_in, factors_in, scales_in, windows_of
from marlin_w4a16.passes.judge.recipe import Factor, Leaves, Source

# How far a traced value may be from its decode for a hypothesis to be looked at closely: three roundings to bfloat16
# stay below 2**-6, neighbouring codes and scales differ by more than 2**-4.
NEAR = 2.0**-5

_Asked = TypeVar("_Asked", bound=tuple[Any, ...])
_Found = TypeVar("_Found")
_Scales = tuple[Tensor, Tensor | None]


class Samples:
    """Some rows of a weight as hypotheses read them.

    Args:
        decode: what computes the weight.
        leaves: the values of its leaves.
        rows: which rows.
    """

    def __init__(self, decode: Decode, leaves: Leaves, rows: list[int]) -> None:
        self._decode, self.rows = decode, rows
        windows = windows_of(decode)
        self._codes = _Once(decode, leaves, codes_in(decode), self._read_codes)
        scales = ((source, window, group) for window in windows for source, group in scales_in(decode, window))
        self._scales = _Once(decode, leaves, scales, self._read_scales)
        factors = ((f, window) for window in windows for f in factors_in(decode, window) if f.node is not None)
        self._of_nodes = _Once(decode, leaves, factors, self._read_factor)
        self._factors: dict[tuple[Window, torch.device], tuple[list[Factor], Tensor]] = {}

    def codes(self, source: Source, window: Window) -> Tensor | None:
        """The codes of the rows ``[rows, k / 2]``, or None: the source holds no codes."""
        return self._codes((source, window))

    def scales(self, source: Source, window: Window, group: int) -> _Scales | None:
        """The block scales of the rows and their factor of each row, or None: the source holds no block scales."""
        return self._scales((source, window, group))

    def factors(self, window: Window, device: torch.device) -> tuple[list[Factor], Tensor]:
        """What a window may be multiplied by, and what each is for the rows, float32 ``[factors, rows]``."""
        if (window, device) not in self._factors:
            factors = list(factors_in(self._decode, window))
            nodes = [self._of_nodes((factor, window)).to(device) for factor in factors if factor.node is not None]
            numbers = [factor.number for factor in factors if factor.node is None]
            spread = torch.tensor(numbers, dtype=torch.float32, device=device)[:, None].expand(-1, len(self.rows))
            self._factors[window, device] = factors, torch.cat([*(value[None] for value in nodes), spread])
        return self._factors[window, device]

    def _read_codes(self, asked: tuple[Source, Window], value: Tensor) -> Tensor | None:
        source, window = asked
        try:
            return source.codes_of(value, self._decode, window, self.rows)
        except ValueError:
            return None

    def _read_scales(self, asked: tuple[Source, Window, int], value: Tensor) -> _Scales | None:
        source, window, group = asked
        try:
            scales, factor = source.scales_of(value, self._decode, window, group)
        except ValueError:
            return None
        at = window.at(self.rows)
        return scales[at], None if factor is None else factor[at]

    def _read_factor(self, asked: tuple[Factor, Window], value: Tensor) -> Tensor:
        factor, window = asked
        return factor.some_rows(value, window, self.rows)


class _Once(Generic[_Asked, _Found]):
    """What hypotheses read of the nodes of a decode: a leaf at any time, of others all of a node's when it has run.

    Args:
        every: the hypotheses, each a tuple whose first has a ``node``.
        read: what one of them reads of the value of its node.
    """

    def __init__(
        self, decode: Decode, leaves: Leaves, every: Iterable[_Asked], read: Callable[[_Asked, Tensor], _Found]
    ) -> None:
        self._decode, self._leaves, self._every, self._read = decode, leaves, every, read
        self._found: dict[_Asked, _Found] = {}
        self._values = self._each_value()

    def __call__(self, asked: _Asked) -> _Found:
        if asked not in self._found and asked[0].node in self._decode.leaf_indices:
            self._found[asked] = self._read(asked, self._decode.source(asked[0].node, self._leaves))
        while asked not in self._found:
            value, of_node = next(self._values)
            self._found.update({one: self._read(one, value) for one in of_node})
        return self._found[asked]

    def _each_value(self) -> Iterator[tuple[Tensor, list[_Asked]]]:
        """The value of each node that is no leaf, and the hypotheses about it."""
        asked: dict[int, list[_Asked]] = defaultdict(list)
        for one in self._every:
            if one[0].node not in self._decode.leaf_indices:
                asked[one[0].node].append(one)
        for node, value in self._decode.sources(asked, self._leaves):
            yield value, asked[node]


def fits_some_scales(codes: Tensor, value: Tensor) -> bool:
    """Whether rows ``[rows, k]`` are nearly codes ``[rows, k / 2]`` times something for each of the smallest groups."""
    group = min(GROUP_SIZES)
    shape = len(codes), value.shape[1] // group
    one = torch.full(shape, 127, dtype=torch.uint8, device=codes.device)
    unit = FP4Weight.unchecked(codes, one, torch.ones(len(codes), device=codes.device), "e8m0", group)
    code, found = (t.double().reshape(*shape, group) for t in (unit.unscaled(torch.float64), value))
    low = torch.where(code == 0, torch.inf, found / code).amin(2)
    high = torch.where(code == 0, -torch.inf, found / code).amax(2)
    apart = (high - low) > 2.5 * NEAR * torch.minimum(low.abs(), high.abs())
    return not bool(apart.any() | ((code == 0) & (found != 0)).any())
