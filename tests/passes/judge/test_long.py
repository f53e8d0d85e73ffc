"""A search runs each operation of a decode a few times, however many there are, and holds few of their values."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marlin_w4a16 import E2M1_VALUES, quantize_nvfp4
from marlin_w4a16.passes.graph import nodes
from marlin_w4a16.passes.judge import search
from marlin_w4a16.passes.judge.search import recognise
from marlin_w4a16.passes.judge.verdict import Found
from marlin_w4a16.passes.settings import Rules

N, K = 32, 64


def plain(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    values = torch.tensor(E2M1_VALUES)[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    scaled = scales.view(torch.float8_e4m3fn).float() * factor
    return (values.unflatten(-1, (-1, 16)) * scaled.unsqueeze(-1)).flatten(-2)


def checkpoint() -> list[Tensor]:
    weight = quantize_nvfp4(torch.randn(N, K))
    return [weight.codes, weight.scales, weight.multiplier[:1].clone()]


def nextafter(w: Tensor, n: int) -> Tensor:
    for _ in range(n):
        w = torch.nextafter(w, w + 1)
    return w


def products(w: Tensor, n: int) -> Tensor:
    for i in range(n):
        w = w * (1 + i * 1e-4)
    return w


def sums(w: Tensor, n: int) -> Tensor:
    first = w
    for _ in range(n):
        w = w + first
    return w


def writes(w: Tensor, n: int) -> Tensor:
    w, read = w.clone(), w
    for _ in range(n):
        read = w.mul_(1.01) * 2
    return read


def writes_of_another_layout(w: Tensor, n: int) -> Tensor:
    w = w.clone().t()
    for _ in range(n):
        w = w.mul_(1.01)
    return w.t()


def copies(w: Tensor, n: int) -> Tensor:
    for _ in range(n):
        w = w.clone()
    return w + 1


def views(w: Tensor, n: int) -> Tensor:
    for _ in range(n):
        w = w.view(N * K).view(N, K)
    return w + 1


def rows(w: Tensor, n: int) -> Tensor:
    factor = w[:, :1]
    for _ in range(n):
        factor = factor * 1.01
    return w * factor


def groups(w: Tensor, n: int) -> Tensor:
    scales = w[:, : K // 16].contiguous()
    for _ in range(n):
        scales = scales * 1.01
    return w * scales.repeat_interleave(16, 1)


LONG = [nextafter, products, sums, writes, writes_of_another_layout, copies, views, rows, groups]


class Runs:
    """The operations that run, and how many values of the size of a weight are there at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = self.most = 0
        self._alive: list[weakref.ref[Tensor]] = []
        self._run: Callable[..., object] = nodes.run
        monkeypatch.setattr(nodes, "run", self)

    def __call__(self, *args: object) -> object:
        value = self._run(*args)
        self.count += 1
        if isinstance(value, Tensor) and value.numel() == N * K:
            self._alive.append(weakref.ref(value))
        there = [tensor for reference in self._alive if (tensor := reference()) is not None]
        self.most = max(self.most, len({tensor.untyped_storage().data_ptr() for tensor in there}))
        return value


@pytest.mark.parametrize("long", LONG)
def test_operations_run_a_fixed_number_of_times(decode_of, monkeypatch, long):
    live, runs = checkpoint(), Runs(monkeypatch)
    times = []
    for n in (20, 40):
        decode = decode_of(lambda *weights, n=n: long(plain(*weights), n), *live)
        runs.count = 0
        recognise(decode, live, "w", Rules())
        times.append(runs.count / len(decode.nodes))
    assert times[1] < 1.2 * times[0] and times[1] < 8
    assert runs.most <= 8


@pytest.mark.parametrize("place", [0, 24])
def test_the_right_codes_are_found_among_many(decode_of, place):
    """Beside 24 more of everything, of which there are some 9,000 pairs."""
    good, live = checkpoint(), list[Tensor]()
    for i in range(25):
        live += good if i == place else checkpoint()

    def one_of_all(*weights: Tensor) -> Tensor:
        out = torch.empty(25, N, K)
        for i in range(25):
            out[i] = plain(*weights[3 * i : 3 * i + 3])
        return out[place]

    found = recognise(decode_of(one_of_all, *live), live, "w", Rules())
    assert isinstance(found, Found) and torch.equal(found.weight.codes, good[0])


def test_too_many_are_refused_with_the_nearest(decode_of, monkeypatch):
    monkeypatch.setattr(search, "_MOST_TRIALS", 10)
    live = checkpoint()
    found = recognise(decode_of(lambda *weights: nextafter(plain(*weights), 3), *live), live, "w", Rules())
    assert found.why.startswith("too many of its tensors may be codes, scales or factors: it is not NVFP4 group 16")


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_that_are_joined_one_by_one(decode_of, monkeypatch, axis):
    runs, times = Runs(monkeypatch), []
    for count in (10, 20):
        live = [t for _ in range(count) for t in checkpoint()]
        live[2::3] = [live[2]] * count

        def joined(*weights: Tensor) -> Tensor:
            first, *rest = (plain(*weights[i : i + 3]) for i in range(0, len(weights), 3))
            for other in rest:
                first = torch.cat((first, other), axis)
            return first

        decode = decode_of(joined, *live)
        runs.count = 0
        found = recognise(decode, live, "w", Rules())
        assert isinstance(found, Found) and torch.equal(found.weight.codes, torch.cat(live[::3], axis))
        times.append(runs.count / len(decode.nodes))
    assert times[1] < 1.2 * times[0]
