"""Times of GPU work by CUDA-graph replay over rotated inputs."""

from collections.abc import Callable
from statistics import median

import torch

ROTATED_BYTES = 256 << 20


def copies_for(nbytes: int) -> int:
    """How many copies of an input to rotate, so that no cache holds them."""
    return max(2, -(-ROTATED_BYTES // nbytes))


def time_graph(call: Callable[[int], object], copies: int, repeats: int = 20) -> float:
    """Median microseconds of ``call(i)``, i = 0 .. copies - 1 captured one after the other in one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / copies * 1e3)
    return median(times)
