"""Where codes, scales and factors of a weight may stand: every hypothesis of the search, cheapest first."""

from collections.abc import Iterator

import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import GROUP_SIZES
from marlin_w4a16.kernels.scale_bytes import SCALE_DTYPES
from marlin_w4a16.passes.judge.decode import Decode, Window
from marlin_w4a16.passes.judge.recipe import Factor, Source


def codes_in(decode: Decode) -> Iterator[tuple[Source, Window]]:
    """Where codes may stand: in bytes; failing that, one by one in what the graph makes of them."""
    k, windows = decode.matrices.k, windows_of(decode)
    for window in windows:
        for node, value in decode.by_size.get(window.total * k // 2, ()):
            if is_bytes(value) and value.numel() * 2 == window.total * k:
                for blocks in _blocks(decode, window):
                    yield Source(node, "low nibble first", blocks), window
                    yield Source(node, "high nibble first", blocks), window
    for node, value in decode.by_size.get(decode.rows * k, ()):
        if value.dtype not in (torch.bool, *SCALE_DTYPES):
            codings = ["a number each", "a value each"] if value.is_floating_point() else ["a number each"]
            for coding in codings:
                for window in windows:
                    for blocks in _blocks(decode, Window(0, decode.rows)):
                        yield Source(node, coding, blocks), window


def windows_of(decode: Decode) -> list[Window]:
    """The windows for which there may be block scales."""
    return [window for window in decode.windows if _of_groups(decode, window)]


def scales_in(decode: Decode, window: Window, codes: int | None = None) -> Iterator[tuple[Source, int]]:
    """Where block scales of a window may stand, beside the node of the codes, and in which groups."""
    for node, value in _of_groups(decode, window):
        group = window.total * decode.matrices.k // value.numel()
        if node != codes and decode.matrices.k % group == 0 and _is_unrounded(decode, node, value):
            for coding in _scalings(value.dtype, group):
                for blocks in _blocks(decode, window):
                    yield Source(node, coding, blocks), group


def _of_groups(decode: Decode, window: Window) -> list[tuple[int, Tensor]]:
    """The tensors that have an element for each group of a window."""
    elements = window.total * decode.matrices.k
    found = [
        each for group in GROUP_SIZES if not elements % group for each in decode.by_size.get(elements // group, ())
    ]
    return sorted(found, key=lambda each: (each[0] not in decode.leaf_indices, each[0]))


def _blocks(decode: Decode, window: Window) -> list[int]:
    """Rows, columns, or columns for each index of the outermost axis of the rows."""
    outer = decode.matrices.sizes[:1]
    return [0, 1, *(size for size in outer if 1 < size < decode.rows and window.total == decode.rows)]


def factors_in(decode: Decode, window: Window) -> Iterator[Factor]:
    """What a window may be multiplied by: tensors, nothing, the numbers of the graph."""
    for node, value in decode.tensors:
        is_float = value.is_floating_point() and value.element_size() > 1 and _is_unrounded(decode, node, value)
        if is_float and value.numel() and window.total % value.numel() == 0:
            yield Factor(node)
    yield Factor()
    yield from (Factor(number=number) for number in decode.numbers)


def _is_unrounded(decode: Decode, node: int, value: Tensor) -> bool:
    """Whether a node holds what the checkpoint does: one in 16 bits that the graph computes may be rounded."""
    return node in decode.leaf_indices or value.dtype not in (torch.float16, torch.bfloat16)


def _scalings(dtype: torch.dtype, group: int) -> list[str]:
    if dtype in SCALE_DTYPES:
        return [f"{SCALE_DTYPES[dtype]} bytes"]
    kinds = ("e4m3", "e8m0") if group == 16 else ("e8m0", "e4m3")  # the usual one first, where both are true
    if dtype in (torch.uint8, torch.int8):
        return [f"{kind} bytes" for kind in kinds]
    return [f"{kind} floats" for kind in kinds] if dtype.is_floating_point and dtype.itemsize > 1 else []


def is_bytes(leaf: Tensor) -> bool:
    """Whether a tensor's elements are bytes, of whatever kind."""
    return leaf.element_size() == 1 and leaf.dtype != torch.bool
