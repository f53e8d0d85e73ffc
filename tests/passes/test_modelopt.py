"""Linears that NVIDIA ModelOpt has quantised, weights only, and compressed."""

import copy

import pytest
import torch
from torch import nn

from marlin_w4a16 import explain
from narrow import wide
from swaps import MLP

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.13",
    reason="the Dynamo of torch 2.11 and 2.12 cannot trace ModelOpt's modules, for any backend",
)

# the format each makes, inputs left alone
CONFIGS = {
    "W4A16_NVFP4_CFG": "NVFP4 group 16", "NVFP4_DEFAULT_CFG": "NVFP4 group 16", "MXFP4_DEFAULT_CFG": "MXFP4 group 32",
}  # fmt: skip


def compressed(model: nn.Module, config: str, x: torch.Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    chosen = copy.deepcopy(getattr(mtq, config))
    chosen["quant_cfg"].append({"quantizer_name": "*input_quantizer", "enable": False})
    mtq.quantize(model, chosen, lambda m: m(x))
    mtq.compress(model)
    return model


PATHS = ("up", "down")


@pytest.mark.parametrize(
    "config, dtype",
    [
        ("W4A16_NVFP4_CFG", torch.float32), ("MXFP4_DEFAULT_CFG", torch.bfloat16),
        wide("W4A16_NVFP4_CFG", torch.bfloat16), wide("MXFP4_DEFAULT_CFG", torch.float32),
        wide("NVFP4_DEFAULT_CFG", torch.float32), wide("NVFP4_DEFAULT_CFG", torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Real quantization has been applied:UserWarning")
@pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute")
def test_compressed_linears_are_replaced(config, dtype, caplog, assert_near):
    caplog.set_level("INFO", "marlin_w4a16")
    x = torch.randn(2, 3, 64, dtype=dtype)
    model = compressed(MLP().to(dtype), config, x)
    with torch.no_grad():
        assert {row.path: row.format for row in explain(model, x).replaced} == {path: CONFIGS[config] for path in PATHS}
        assert_near(torch.compile(model, backend="marlin_w4a16", fullgraph=True)(x), model(x))
    assert "replaced 2 of 2 FP4 linears" in caplog.text
