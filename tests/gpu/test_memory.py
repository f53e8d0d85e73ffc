"""Packing takes no more device memory than the packed tensors, one source tensor and 64 MB."""

import pytest
import torch

from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.layout import pack, pack_into
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4

pytestmark = pytest.mark.gpu


def peak_above(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - start


@pytest.mark.parametrize("quantize", [quantize_nvfp4, quantize_mxfp4])
def test_packing(quantize):
    weight = quantize(torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16))
    packed, peak = peak_above(lambda: pack(weight))
    assert peak <= packed.nbytes + weight.codes.nbytes + (64 << 20)
    _, peak = peak_above(lambda: pack_into(weight, packed))
    assert peak <= 64 << 20
    unpacked, peak = peak_above(packed.unpack)
    assert torch.equal(unpacked.codes, weight.codes) and torch.equal(unpacked.scales, weight.scales)


def test_prefill_takes_two_bounded_scratch_tensors():
    packed = pack(quantize_nvfp4(torch.randn(28672, 8192, device="cuda", dtype=torch.bfloat16)))
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out, peak = peak_above(lambda: linear(x, packed))
    assert peak - out.nbytes <= 3 * (32 << 20)
