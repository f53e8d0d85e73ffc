"""Linears that own their packed weights: nothing to look up, nothing held twice, right in eager mode too."""

from typing import Any

import torch
from torch import Tensor, nn

from marlin_w4a16.fake_impls.linear import again, linear
from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.modules.absent import absent
from marlin_w4a16.modules.state import PackedState, held, parameter_of
from marlin_w4a16.report.table import size


class PackedLinear(PackedState, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """``x @ weight.T + bias`` from a weight that is held packed, and nowhere else.

    A ``nn.Linear`` whose ``weight`` is empty (absent.py), so that libraries which look for linears find it: PEFT puts
    adapters on it, and a merge gets an error. Its dtype and device are those of the activations, as
    ``x.to(linear.weight.dtype)`` expects. It is of torch's class of linears that nothing quantises, so that torchao's
    ``quantize_`` passes it by.

    Runs in eager mode and under any torch.compile backend, as one op; captured in a CUDA graph it sees what is loaded
    in place later (``load_state_dict``). Its parameters are the bias and the empty weight; the packed tensors are plain
    attributes. Casts of the module (``half()``, ``to(dtype)``) leave these as they are: bits, and float32.

    The state dict holds them as they are packed, and ``_extra_state`` says how: JSON bytes with the layout's id, the
    format and the shape. A state of another layout, format or shape is refused before anything is overwritten.

    Args:
        weight: in canonical or packed form, ``[n, k]``; a canonical one is packed on its device.
        bias: ``[n]`` or None; a Parameter is kept as it is.
        dtype: the activations to come, where no bias tells it; also for a canonical weight whose scales float16 cannot
            hold (see `FP4Weight.fit`).

    Raises:
        ValueError: the weight has more than two dimensions, or scales that ``dtype`` cannot hold.
    """

    def __init__(
        self, weight: FP4Weight | PackedFP4, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        PackedState.__init__(self)
        if weight.multiplier.ndim != 1:
            raise ValueError(f"PackedLinear: found a weight of {weight.multiplier.ndim + 1} dimensions, expected 2")
        packed = pack(weight if isinstance(weight, PackedFP4) else weight.fit_first(torch.float16, dtype))
        self.in_features, self.out_features = packed.k, packed.n
        self._own({"": packed}, {"bias": parameter_of(bias)}, dtype)

    words: Tensor
    scales: Tensor
    multiplier: Tensor
    _empties = ("weight",)
    weight = absent("weight")

    @property
    def qweight(self) -> Tensor:
        """The packed codes; PEFT puts adapters on the device it finds here."""
        return self.words

    @property
    def packed(self) -> PackedFP4:
        """The weight in packed form; its tensors are the module's own."""
        return self._packed("")

    def to_fp4(self, name: str = "weight") -> FP4Weight:
        """The weight in canonical form, every code and scale byte as it was packed; ``decode()`` makes it dense."""
        return self.packed.unpack(name)

    def forward(self, x: Tensor) -> Tensor:
        """See `marlin_w4a16.linear`."""
        if torch.compiler.is_compiling():
            return self._asking(linear(x, self._packed(""), self.bias))
        packed, own = self._kept(""), self._parameters
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401 (nn.Module looks an attribute up in Python)
        out = again(x, packed, bias)
        if out is None:
            self._expect_one()
            out = linear(x, packed, bias)
        return self._asking(out)

    def reset_parameters(self) -> None:
        """Leaves it as it is, the bias too: bits have no initial value."""

    def extra_repr(self) -> str:
        """Shape, format and bytes of the packed weight."""
        format, nbytes = held(self)
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {format}, {size(nbytes)}"

    @property
    def _packing(self) -> dict[str, Any]:
        n, k, kind, group, layout = self._formats[""]
        return {"layout": layout, "kind": kind, "group": group, "n": n, "k": k}
