"""CUDA graphs and streams."""

import pytest
import torch
from gpu.capture import captured

from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.quantize import quantize_nvfp4

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("m", [1, 16, 64, 300, 2100])
def test_a_captured_call_replays_with_new_contents(m):
    packed = pack(quantize_nvfp4(torch.randn(1088, 2048, device="cuda")))
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    linear(x, packed)
    graph, out = captured(lambda: linear(x, packed))
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, linear(x, packed))


def test_a_captured_call_sees_a_weight_packed_over_the_old_one():
    from marlin_w4a16.kernels.layout import pack_into

    first, second = (quantize_nvfp4(torch.randn(256, 512, device="cuda")) for _ in range(2))
    packed, x = pack(first), torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    linear(x, packed)
    graph, out = captured(lambda: linear(x, packed))
    pack_into(second, packed)
    graph.replay()
    assert torch.equal(out, linear(x, pack(second)))


@pytest.mark.parametrize("write", [torch.Tensor.copy_, lambda x, new: torch.neg(new, out=x)], ids=["copy", "kernel"])
@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 300])
@pytest.mark.parametrize("sizes", [(2048, 4096), (16384, 1120)], ids=str)
def test_linears_that_start_early_in_a_graph_wait_for_what_they_read(m, sizes, write):
    """Each kernel of the capture may start before the one ahead of it has ended."""
    k, n = sizes
    up, down = (quantize_nvfp4(torch.randn(shape, device="cuda") / 64) for shape in ((n, k), (k, n)))
    first, second = pack(up), pack(down)
    source, x = (torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    linear(linear(x, first, bias), second)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write(x, source)
        out = linear(linear(x, first, bias), second)
        again = linear(linear(out, first, bias), second)
    for _ in range(20):
        source.normal_()
        for tensor in (x, out, again):
            tensor.fill_(torch.nan)
        graph.replay()
        expected = linear(linear(x, first, bias), second)
        assert not expected.isnan().any() and torch.equal(out, expected)
        assert torch.equal(again, linear(linear(expected, first, bias), second))


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_a_weight_written_in_the_capture_is_read_after_it_is_written(m):
    packed, *others = (pack(quantize_nvfp4(torch.randn(1088, 2048, device="cuda"))) for _ in range(3))
    chosen = pack(quantize_nvfp4(torch.randn(1088, 2048, device="cuda")))
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    linear(x, packed)

    def write(target, weight):
        for name in ("words", "scales", "multiplier"):  # in the order of pack_into
            torch.add(getattr(weight, name), 0, out=getattr(target, name))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = linear(x, packed)
        write(packed, chosen)
        out = linear(x, packed)
    for weight in others * 5:
        write(chosen, weight)
        expected = linear(x, packed)
        graph.replay()
        assert torch.equal(before, expected) and torch.equal(out, linear(x, weight))


def test_two_streams_at_once():
    packed = [pack(quantize_nvfp4(torch.randn(4096, 4096, device="cuda"))) for _ in range(2)]
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    expected, streams = [linear(x, p) for p in packed], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(50):
        for stream, p, out in zip(streams, packed, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(linear(x, p))
    torch.cuda.synchronize()
    for outs, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in outs)
