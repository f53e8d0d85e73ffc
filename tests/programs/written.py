"""A linear whose author decodes FP4 by hand, put together from functions: each form replaces one of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import E2M1_VALUES, FP4Weight, quantize_mxfp4, quantize_nvfp4
from programs.program import Program

N, K = 48, 64
TABLE = torch.tensor(E2M1_VALUES)
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e8m0": torch.float8_e8m0fnu}
QUANTIZERS = {"e4m3": quantize_nvfp4, "e8m0": quantize_mxfp4}
# What becomes of the global scale ``[n]`` of a quantised weight.
FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "general": lambda g: g * 0.9321, "none": torch.ones_like, "power of two": lambda g: g.log2().round().exp2(),
    "per row": lambda g: g * (0.5 + torch.rand_like(g)),
}  # fmt: skip


def checkpoint(
    kind: str = "e4m3", group: int | None = None, n: int = N, k: int = K, factor: str = "general"
) -> FP4Weight:
    """A random weight as a checkpoint holds it; ``factor`` names its global scale."""
    weight = QUANTIZERS[kind](torch.randn(n, k), *(() if group is None else (group,)))
    return replace(weight, multiplier=FACTORS[factor](weight.multiplier))


def elements(weight: FP4Weight) -> Tensor:
    """The codes of a weight, one a byte, ``[n, k]``."""
    return torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(-2)


def nibbles(m: "Written") -> Tensor:
    return torch.stack((m.codes & 15, m.codes >> 4), -1).flatten(-2)


def by_table(m: "Written") -> Tensor:
    return TABLE[m.unpack(m).int()]


def float8(m: "Written") -> Tensor:
    return m.scales.view(FLOAT8[m.kind]).float()


def scale_times_factor(m: "Written") -> Tensor:
    return float8(m) * m.factor


def by_groups(values: Tensor, scales: Tensor) -> Tensor:
    return (values.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def decode_by_groups(m: "Written") -> Tensor:
    return by_groups(m.values(m), m.scale(m)).to(m.dtype)


class Written(nn.Module):
    """An FP4 linear as its author wrote it.

    ``weight()`` is the weight as traced, ``exact()`` the same in float64 and without a rounding; ``product`` takes
    either: what a form should give is ``product(exact(), *inputs)``.

    Args:
        fp4: the weight; it stays a plain attribute that no forward reads.
        store: further tensors (buffers) and numbers (attributes) of the checkpoint, by name, over ``codes``,
            ``scales`` and ``factor``.
        unpack: module -> the codes, one a byte.
        values: module -> the values of the codes.
        scale: module -> one scale for each group.
        decode: module -> the weight, as a rule from both.
        multiply: module, weight, inputs -> output.
        arrange: the decode ``[n, k]`` as ``decode`` shapes it.
        call: module, inputs -> output, the forward.
    """

    def __init__(
        self,
        fp4: FP4Weight,
        dtype: torch.dtype = torch.float32,
        *,
        store: Callable[[FP4Weight], Mapping[str, Any]] = lambda fp4: {},
        unpack: Callable[..., Tensor] = nibbles,
        values: Callable[..., Tensor] = by_table,
        scale: Callable[..., Tensor] = scale_times_factor,
        decode: Callable[..., Tensor] = decode_by_groups,
        multiply: Callable[..., Tensor] = lambda m, weight, x: linear(x, weight, m.bias),
        arrange: Callable[[Tensor], Tensor] = lambda weight: weight,
        call: Callable[..., Tensor] = lambda m, *inputs: m.product(m.weight(), *inputs),
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.fp4, self.kind, self.group, self.dtype = fp4, fp4.kind, fp4.group, dtype
        self.unpack, self.values, self.scale, self.decode = unpack, values, scale, decode
        self.multiply, self.arrange, self.call = multiply, arrange, call
        self.bias = nn.Parameter(torch.randn(fp4.n, dtype=dtype)) if bias else None
        stored = {"codes": fp4.codes, "scales": fp4.scales, "factor": fp4.multiplier[:1].clone(), **store(fp4)}
        for name, value in stored.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def weight(self) -> Tensor:
        return self.decode(self)

    def exact(self) -> Tensor:
        return self.arrange(self.fp4.decode())

    def product(self, weight: Tensor, *inputs: Tensor) -> Tensor:
        return self.multiply(self, weight, *inputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self, *inputs)


def written(
    name: str,
    section: str,
    *,
    x: tuple[int, ...] = (3, K),
    also: tuple[tuple[int, ...], ...] = (),
    dtype: torch.dtype = torch.float32,
    saved: Mapping[str, Any] | None = None,
    expect: Mapping[str, Any] | None = None,
    **parts: Any,
) -> Program:
    """A form of a `Written`.

    Args:
        x, also: the shapes of its inputs.
        saved: arguments of `checkpoint`.
        expect: further fields of `Program`.
        parts: arguments of `Written`.
    """

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        module = Written(checkpoint(**(saved or {})), dtype, **parts)
        return module, tuple(torch.randn(*shape, dtype=dtype) for shape in (x, *also))

    return Program(name, section, build, dtype=dtype, **(expect or {}))
