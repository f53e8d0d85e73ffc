"""FP4 models (NVFP4, MXFP4) with 16-bit activations: ``torch.compile(model, backend="marlin_w4a16")``.

`FP4Weight` is a weight in its canonical form, `pack` brings it into the kernels' layout, `linear` and `dequantize` run
packed weights, `explain` says what the backend would do to a model.
"""

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.fp4 import E2M1_VALUES, FP4Weight, fp4_weight
from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.refresh import refresh
from marlin_w4a16.report import Report, explain

__version__ = "0.1.0"
__all__ = [
    "E2M1_VALUES",
    "FP4Weight",
    "PackedFP4",
    "Report",
    "dequantize",
    "explain",
    "fp4_weight",
    "linear",
    "pack",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "refresh",
]
