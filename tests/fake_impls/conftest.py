import pytest
import torch

from marlin_w4a16.kernels.layout import PackedFP4, pack
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4


@pytest.fixture
def packed(request: pytest.FixtureRequest) -> PackedFP4:
    """40 rows and 96 columns, which no tile divides; NVFP4, or MXFP4 where a test asks for it by indirect."""
    quantize = quantize_mxfp4 if getattr(request, "param", "") == "mxfp4" else quantize_nvfp4
    return pack(quantize(torch.randn(40, 96)))
