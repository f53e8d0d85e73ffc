"""FP4 models (NVFP4, MXFP4) with 16-bit activations: ``torch.compile(model, backend="marlin_w4a16")``.

`FP4Weight` is a weight in its canonical form, `pack` brings it into the kernels' layout, `linear` and `dequantize` run
packed weights, `moe` and `grouped_linear` those of experts. `prepare` gives a loaded model modules that own packed
weights (`PackedLinear`), `restore` undoes it; `PackedExperts` is such a module for a mixture of experts.
`quantize` makes such a model from a dense one.
`explain` says what the backend would do to a model, `debug` writes what it did; `refresh` tells it of writes that
nothing can see.
"""

from marlin_w4a16.backend import NotReplaced
from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.fake_impls.moe import moe
from marlin_w4a16.kernels.activation import Activation
from marlin_w4a16.kernels.experts import pack_bias, pack_experts, unpack_bias, unpack_experts
from marlin_w4a16.kernels.fp4 import E2M1_VALUES, FP4Weight, fp4_weight
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear
from marlin_w4a16.prepare import prepare, restore
from marlin_w4a16.quantized import quantize
from marlin_w4a16.refresh import refresh
from marlin_w4a16.report.data import Report
from marlin_w4a16.report.debug import debug
from marlin_w4a16.report.explain import explain
from marlin_w4a16.version import __version__ as __version__

__all__ = [
    "E2M1_VALUES",
    "Activation",
    "FP4Weight",
    "NotReplaced",
    "PackedExperts",
    "PackedFP4",
    "PackedLinear",
    "Report",
    "debug",
    "dequantize",
    "explain",
    "fp4_weight",
    "grouped_linear",
    "linear",
    "moe",
    "pack",
    "pack_bias",
    "pack_experts",
    "prepare",
    "quantize",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "refresh",
    "restore",
    "unpack_bias",
    "unpack_experts",
]
