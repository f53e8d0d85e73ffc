"""Stands in for a Gluon kernel: keeps what it is launched with, and compiles it for that."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.machine import Compiled, compiled

CAPABILITY = (9, 0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {torch.float32: "fp32", torch.int32: "i32", **{dtype: name for name, dtype in DTYPES.items()}}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.launch

    def launch(self, *arguments: Any, **options: Any) -> None:
        self.arguments, self.options = arguments, options

    def compiled(self) -> Compiled:
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
        runtime = {name: options.pop(name) for name in ("num_warps", "maxnreg", "launch_pdl") if name in options}
        return compiled(CAPABILITY, self.kernel, types, constants | options, tuple(divisible), **runtime)
