"""Stands in for a kernel: keeps what it is launched with, and compiles it for that."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.machine import Compiled, compiled
from marlin_w4a16.kernels.layout import PackedFP4, packed_shapes

CAPABILITY = (9, 0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {
    torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64", **{dtype: name for name, dtype in DTYPES.items()},
}  # fmt: skip
RUNTIME = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")


def weight_without_memory(n: int, k: int, kind: str, group: int, *lead: int) -> PackedFP4:
    """A packed weight, or a stack of them, that is nothing but shapes."""
    dtypes = (torch.int32, torch.uint8, torch.float32)
    shapes = zip(packed_shapes(n, k, group), dtypes, strict=True)
    tensors = (torch.empty((*lead, *shape), dtype=dtype, device="meta") for shape, dtype in shapes)
    return PackedFP4(*tensors, n, k, kind, group)


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def compiled(self, capability: tuple[int, int] = CAPABILITY) -> Compiled:
        """The kernel as the runtime compiles it for these arguments."""
        types, constants, divisible = {}, {}, []
        for parameter, value in zip(self.kernel.params, self.arguments, strict=False):
            specialised = not parameter.do_not_specialize
            if isinstance(value, Tensor):
                types[parameter.name] = f"*{NAMES[value.dtype]}"
            elif isinstance(value, TensorDescriptor):
                name = NAMES[value.base.dtype]
                types[parameter.name] = f"tensordesc<{name}{value.block_shape},{value.layout!r}>"
            elif value == 1 and specialised:
                constants[parameter.name] = 1
            elif value % 16 == 0 and specialised:
                divisible.append(parameter.name)
        options = dict(self.options)
        runtime = {name: options.pop(name) for name in RUNTIME if name in options}
        return compiled(capability, self.kernel, types, constants | options, tuple(divisible), **runtime)
