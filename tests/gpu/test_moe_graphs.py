"""Mixtures of experts in CUDA graphs, on streams, without waiting and within their memory."""

from dataclasses import fields, replace

import pytest
import torch
from gpu.capture import captured
from torch import Tensor

from marlin_w4a16.kernels.experts import Experts
from marlin_w4a16.kernels.layout import pack_into
from marlin_w4a16.kernels.moe import moe
from mixtures.exact import drawn
from mixtures.oracle import draw_routing

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_the_gpu")]


def run(experts: Experts, x: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None = None) -> Tensor:
    return moe(x, experts, weights, ids, expert_map)


def tensors(experts: Experts) -> list[Tensor]:
    weights = [getattr(w, f.name) for w in (experts.w13, experts.w2) for f in fields(w)]
    return [t for t in (*weights, experts.bias13, experts.bias2) if isinstance(t, Tensor)]


@pytest.mark.parametrize("tokens", [1, 4, 8, 40, 300, 2100])
def test_a_captured_call_replays_with_new_tokens_choices_and_weights(tokens):
    experts, *others = (drawn(torch.bfloat16, 8, 352, 192, "gpt-oss", biases=True)[1] for _ in range(3))
    x, (weights, ids) = torch.randn(tokens, 352, dtype=torch.bfloat16), draw_routing(tokens, 2, 8)
    expert_map = torch.arange(8)
    run(experts, x, weights, ids, expert_map)
    graph, out = captured(lambda: run(experts, x, weights, ids, expert_map))
    for turn in range(6):
        if turn % 3:
            for own, new in zip(tensors(experts), tensors(others[turn % 2]), strict=True):
                own.copy_(new)
        x.normal_()
        weights.uniform_()
        ids.random_(-2, 10)  # some nowhere, some twice
        expert_map.copy_(torch.randperm(8))
        if turn == 5:
            ids.fill_(3)
        out.fill_(torch.nan)
        graph.replay()
        assert not out.isnan().any()
        assert torch.equal(out, run(experts, x, weights, ids, expert_map))


def test_a_captured_call_sees_weights_packed_over_the_old_ones():
    first, second = (drawn(torch.bfloat16, 4, 96, 96) for _ in range(2))
    x, routing = torch.randn(6, 96, dtype=torch.bfloat16), draw_routing(6, 2, 4)
    run(first[1], x, *routing)
    graph, out = captured(lambda: run(first[1], x, *routing))
    for expert in range(4):
        w2 = second[0].w2
        matrix = replace(w2, codes=w2.codes[expert], scales=w2.scales[expert], multiplier=w2.multiplier[expert])
        pack_into(matrix, first[1].w2.matrix(expert))
    graph.replay()
    assert torch.equal(out, run(replace(first[1], w2=second[1].w2), x, *routing))


@pytest.mark.parametrize("tokens", [1, 8, 40, 300])
def test_calls_that_start_early_in_a_graph_wait_for_what_they_read(tokens):
    """Layers one after the other: each kernel of the capture may start before the one ahead of it has ended."""
    layers = [drawn(torch.bfloat16, 8, 352, 192, "gpt-oss", biases=True)[1] for _ in range(3)]
    source, x = (torch.randn(tokens, 352, dtype=torch.bfloat16) for _ in range(2))
    choices = [draw_routing(tokens, 2, 8) for _ in layers]
    chosen = [(torch.empty_like(w), torch.empty_like(i)) for w, i in choices]

    def forward() -> Tensor:
        torch.neg(source, out=x)
        y = x
        for layer, given, own in zip(layers, choices, chosen, strict=True):
            for a, b in zip(given, own, strict=True):
                torch.add(a, 0, out=b)
            y = run(layer, y, *own)
        return y

    forward()
    graph, out = captured(forward)
    for _ in range(10):
        source.normal_()
        for weights, ids in choices:
            weights.uniform_()
            ids.random_(0, 8)
        for tensor in (x, out):
            tensor.fill_(torch.nan)
        for weights, ids in chosen:
            weights.fill_(torch.nan)
            ids.fill_(-1)
        graph.replay()
        found = out.clone()
        assert not found.isnan().any() and torch.equal(found, forward())


@pytest.mark.parametrize("tokens", [2, 200])
def test_two_streams_at_once(tokens):
    layers = [drawn(torch.bfloat16, 16, 1024, 512)[1] for _ in range(2)]
    x, routing = torch.randn(tokens, 1024, dtype=torch.bfloat16), draw_routing(tokens, 4, 16)
    expected, streams = [run(layer, x, *routing) for layer in layers], [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(30):
        for stream, layer, out in zip(streams, layers, results, strict=True):
            with torch.cuda.stream(stream):
                out.append(run(layer, x, *routing))
    torch.cuda.synchronize()
    for outs, right in zip(results, expected, strict=True):
        assert all(torch.equal(out, right) for out in outs)


@pytest.mark.parametrize("tokens", [1, 40, 2100])
@pytest.mark.parametrize("with_map", [False, True])
def test_nothing_waits_for_the_gpu(with_map, tokens):
    _, experts = drawn(torch.bfloat16, 8, 352, 192, "gpt-oss", biases=True)
    x, (weights, ids) = torch.randn(tokens, 352, dtype=torch.bfloat16), draw_routing(tokens, 2, 8)
    expert_map = torch.arange(8) if with_map else None
    first = run(experts, x, weights, ids, expert_map)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(experts, x, weights, ids, expert_map)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, again)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_no_more_memory_than_what_is_between_the_kernels(tokens):
    """The tokens in the order of their experts, what stands between the products, and what is added up."""
    _, experts = drawn(torch.bfloat16, 16, 1024, 512)
    x, routing = torch.randn(tokens, 1024, dtype=torch.bfloat16), draw_routing(tokens, 4, 16)
    run(experts, x, *routing)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    out = run(experts, x, *routing)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - start - out.nbytes
    assert peak <= tokens * 4 * (2 * 1024 + 2 * 512 + 4 * 1024) + (4 << 20)
