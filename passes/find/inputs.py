"""Finds the quantisation of a linear's input (W4A4), told by what the operations do to random data."""

from typing import Any

import torch
from torch import Tensor, fx

from marlin_w4a16.fake_impls.library import DTYPES
from marlin_w4a16.kernels.fp4 import E2M1_VALUES, GROUP_SIZES
from marlin_w4a16.passes.graph.constants import Constants, value_of_constant
from marlin_w4a16.passes.graph.nodes import evaluate, example, sizes
from marlin_w4a16.passes.graph.purity import written_by

# NVIDIA ModelOpt's fake quantisers are operators of their own, which run on GPUs only.
_OPERATORS = ("tensorrt.dynamic_block_quantize_op", "tensorrt.quantize_op")
_FARTHEST = 64  # nodes between an input and its quantised form
_CLOSE = 1e-2  # a quantiser may compute in bfloat16


def quantised(x: fx.Node, constants: Constants, live: dict[fx.Node, Any]) -> fx.Node | None:
    """What was quantised to FP4 to give ``x``, the input of a product, or None; ``live`` are the values of leaves."""
    if str(x.target).removesuffix(".default") in _OPERATORS:
        source = x.args[0]
        return source if isinstance(source, fx.Node) else None
    between: list[fx.Node] = []
    todo = [x]
    while todo and len(between) < _FARTHEST:
        # the latest of what remains: once it alone remains, everything so far was computed from it
        todo.sort()
        node = todo.pop()
        if not todo and node is not x and _alike(node, x) and _quantises(node, x, between, constants, live):
            return node
        if node.op == "placeholder" or written_by(node):
            return None
        between.append(node)
        todo += [n for n in node.all_input_nodes if n not in constants and n not in todo]
    return None


def _quantises(
    source: fx.Node, x: fx.Node, between: list[fx.Node], constants: Constants, live: dict[fx.Node, Any]
) -> bool:
    """Whether the operations between two nodes round random data to codes times a scale a group."""
    like = example(source)
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(sizes(source), generator=generator).to(like.device, like.dtype)
    used = {n for node in between for n in node.all_input_nodes if n in constants}
    try:
        known = {source: data} | {node: value_of_constant(node, constants, live) for node in used}
        values = evaluate(sorted(between), known)
    except Exception:  # what cannot be run alone is not known to be a quantiser
        return False
    return any(_is_grid(data, values[x], group) for group in GROUP_SIZES)


def _is_grid(data: Tensor, found: Any, group: int) -> bool:
    if not isinstance(found, Tensor) or found.shape != data.shape or data.shape[-1] % group or torch.equal(found, data):
        return False
    shape = (*data.shape[:-1], data.shape[-1] // group, group)
    blocks, rounded = data.double().reshape(shape), found.double().reshape(shape)
    top = rounded.abs().amax(-1, keepdim=True)
    grid = torch.tensor(E2M1_VALUES[:8], dtype=torch.float64, device=data.device)
    near = (rounded.abs() / top).nan_to_num(0.0)
    on_grid = torch.zeros_like(top, dtype=torch.bool)
    for code in (6.0, 4.0, 3.0):  # which the largest value of a block may have
        distance = (near.unsqueeze(-1) - grid / code).abs().amin(-1)
        on_grid |= (distance < _CLOSE).all(-1, keepdim=True)
    step = blocks.abs().amax(-1, keepdim=True)
    return bool(on_grid.all()) and bool(((rounded - blocks).abs() <= step / 4).all())


def _alike(node: fx.Node, x: fx.Node) -> bool:
    before, after = example(node), example(x)
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    return before.shape == after.shape and before.dtype == after.dtype and before.dtype in DTYPES
