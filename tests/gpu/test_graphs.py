"""CUDA graphs and streams."""

import pytest
import torch

from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.quantize import quantize_nvfp4

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m", [1, 16, 64, 300, 2100])
def test_a_captured_call_replays_with_new_contents(m):
    packed = pack(quantize_nvfp4(torch.randn(1088, 2048, device="cuda")))
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, packed)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, linear(x, packed))


def test_a_captured_call_sees_a_weight_packed_over_the_old_one():
    from marlin_w4a16.kernels.layout import pack_into

    first, second = (quantize_nvfp4(torch.randn(256, 512, device="cuda")) for _ in range(2))
    packed = pack(first)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    linear(x, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x, packed)
    pack_into(second, packed)
    graph.replay()
    assert torch.equal(out, linear(x, pack(second)))


def test_two_streams_at_once():
    packed = [pack(quantize_nvfp4(torch.randn(4096, 4096, device="cuda"))) for _ in range(2)]
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    expected = [linear(x, p) for p in packed]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for stream, p, out in zip(streams, packed, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(linear(x, p))
    torch.cuda.synchronize()
    for outs, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in outs)
