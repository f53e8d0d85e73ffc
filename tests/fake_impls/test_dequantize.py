import re

import pytest
import torch

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.fake_impls.library import weight_args

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
BOTH_KINDS = pytest.mark.parametrize("packed", ["nvfp4", "mxfp4"], indirect=True)


@BOTH_KINDS
@DTYPES
def test_it_is_the_exact_weight_rounded_once(packed, dtype):
    assert torch.equal(dequantize(packed, dtype), packed.unpack().decode(dtype))


@BOTH_KINDS
@DTYPES
def test_opcheck(packed, dtype):
    name = str(dtype).removeprefix("torch.")
    torch.library.opcheck(torch.ops.marlin_w4a16.dequantize.default, (*weight_args(packed), name))


def test_it_compiles_into_one_graph(packed):
    compiled = torch.compile(lambda: dequantize(packed, torch.bfloat16) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), dequantize(packed, torch.bfloat16) * 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_another_dtype_is_named(packed, dtype):
    name = str(dtype).removeprefix("torch.")
    message = f"marlin_w4a16::dequantize: dtype: found '{name}', expected one of ('float16', 'bfloat16', 'float32')"
    with pytest.raises(ValueError, match=re.escape(message)):
        dequantize(packed, dtype)
