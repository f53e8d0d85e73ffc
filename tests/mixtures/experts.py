"""Experts of transformers as a loader that keeps FP4 leaves them: stacked codes and scales, decoded in forward."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16 import E2M1_VALUES, FP4Weight, quantize_nvfp4

NAMES = ("gate_up_proj", "up_proj", "down_proj")


def stacked(dense: Tensor, quantize: Callable[[Tensor], FP4Weight] = quantize_nvfp4) -> FP4Weight:
    """The experts ``[experts, n, k]`` quantised one by one, each with a factor of its own."""
    parts = [quantize(matrix) for matrix in dense.float()]
    codes, scales, multiplier = (
        torch.stack([getattr(part, name) for part in parts]) for name in ("codes", "scales", "multiplier")
    )
    return FP4Weight(codes, scales, multiplier, parts[0].kind, parts[0].group)


def hold_fp4(
    module: nn.Module,
    quantize: Callable[[Tensor], FP4Weight] = quantize_nvfp4,
    names: tuple[str, ...] = NAMES,
    transposed: bool = False,
) -> None:
    """Makes a module hold its stacked weights in FP4 and decode them whenever it reads one.

    Args:
        module: has parameters of some of these names, ``[experts, n, k]``, or ``[experts, k, n]`` if ``transposed``.
        quantize: the format.
        names: of its weights.
        transposed: see ``module``.
    """
    held = []
    for name in (name for name in names if isinstance(getattr(module, name, None), nn.Parameter)):
        dense = getattr(module, name).detach()
        weight = stacked(dense.transpose(1, 2) if transposed else dense, quantize)
        delattr(module, name)
        module.register_buffer(f"{name}_codes", weight.codes)
        module.register_buffer(f"{name}_scales", weight.scales)
        module.register_buffer(f"{name}_factor", weight.multiplier[:, 0].clone())
        held.append((name, weight.kind, transposed, dense.dtype))
    module.register_buffer("table", torch.tensor(E2M1_VALUES))
    module.__class__ = _decoding(type(module), tuple(held))


@functools.cache
def _decoding(cls: type, held: tuple[tuple[Any, ...], ...]) -> type:
    """One class for all layers of a model, so that they share what is compiled."""
    return type(cls.__name__, (cls,), {name: property(_decoder(name, *how)) for name, *how in held})


def _decoder(name: str, kind: str, transposed: bool, dtype: torch.dtype) -> Callable[[nn.Module], Tensor]:
    def decode(module: nn.Module) -> Tensor:
        codes, scales = getattr(module, f"{name}_codes"), getattr(module, f"{name}_scales")
        value = module.table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
        scale = scales.view(torch.float8_e4m3fn).float() if kind == "e4m3" else torch.exp2(scales.float() - 127)
        blocks = value.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)
        dense = (blocks.flatten(-2) * getattr(module, f"{name}_factor")[:, None, None]).to(dtype)
        return dense.transpose(1, 2) if transposed else dense

    return decode
