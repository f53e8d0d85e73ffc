"""Packing takes no more device memory than the packed tensors, one source tensor and 64 MB; copies are freed."""

import gc

import pytest
import torch
from torch import nn

from marlin_w4a16 import PackedLinear, prepare, restore
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.layout import pack, pack_into
from marlin_w4a16.kernels.quantize import quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.passes.outcome import Replaced
from marlin_w4a16.passes.rewrite import rewrite

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
    linear(x, packed)  # cuBLAS takes its workspace
    out, peak = peak_above(lambda: linear(x, packed))
    assert peak - out.nbytes <= 3 * (32 << 20)


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@torch.no_grad()
def test_packed_copies_are_freed_with_their_model_and_with_the_compiled_function(fp4_linear, monkeypatch):
    monkeypatch.setattr(fp4_linear, "device", "cuda")
    run = torch.compile(lambda model, x: model(x), backend="marlin_w4a16")
    x = torch.randn(4, 1024, device="cuda")
    x @ x.mT  # cuBLAS takes its workspace
    start = allocated()
    models = [fp4_linear(4096, 1024) for _ in range(3)]
    size = allocated() - start
    for model in models:
        run(model, x)
    both = allocated() - start
    assert both >= 1.9 * size
    del models[:2], model
    assert allocated() - start <= 1.1 * both / 3
    torch._dynamo.reset()
    del run
    assert allocated() - start <= 1.1 * size / 3


@torch.no_grad()
def test_prepare_and_restore_free_what_they_replace():
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    start = allocated()
    model = nn.Sequential(*(nn.Linear(8192, 8192, bias=False) for _ in range(4))).to("cuda", torch.bfloat16)
    quantization.quantize_(model, NVFP4WeightOnlyConfig())
    before = allocated()
    swaps, peak = peak_above(lambda: prepare(model))
    assert len(swaps.done) == 4 and all(isinstance(m, PackedLinear) for m in model)
    packed, source = swaps.done[0].after, swaps.done[0].before
    assert peak <= 4 * packed + source + (64 << 20)
    assert allocated() - start <= 4 * packed + (1 << 20) and before - start >= 4 * source
    restore(model)
    assert allocated() <= before + (1 << 20)


@torch.no_grad()
def test_finding_a_weight_takes_no_more_than_an_eager_forward_and_64_mb(fp4_linear, monkeypatch):
    monkeypatch.setattr(fp4_linear, "device", "cuda")
    model, x = fp4_linear(8192, 8192, dtype=torch.bfloat16), torch.randn(1, 8192, device="cuda", dtype=torch.bfloat16)
    model(x)
    _, eager = peak_above(lambda: model(x))
    peaks = []

    def backend(gm, inputs):
        rewritten, peak = peak_above(lambda: rewrite(gm, inputs))
        assert [type(row.outcome) for row in rewritten.rows] == [Replaced]
        peaks.append(peak)
        return gm.forward

    torch.compile(model, backend=backend)(x)
    assert len(peaks) == 1 and peaks[0] <= eager + (64 << 20)
