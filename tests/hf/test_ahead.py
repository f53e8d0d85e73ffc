"""Linears are read ahead, by a thread of their own."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

from hf.loading import load, stored, written
from marlin_w4a16.checkpoints import files
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.hf import ahead
from marlin_w4a16.hf.ahead import Ahead, one_device

CPU = torch.device("cpu")


class Layer:
    """What is read of one."""

    storage = None

    def __init__(self, entries: dict[str, Entry], name: str) -> None:
        self.entries, self._name = entries, name

    def name(self, leaf: str) -> str:
        return f"{self._name}.{leaf}"


def layers() -> dict[str, Layer]:
    entries = files.entries([next(written("modelopt-nvfp4", "llama").glob("*.safetensors"))])
    paths = dict.fromkeys(name.rpartition(".")[0] for name in entries if "_proj" in name)
    return {
        path: Layer(
            {name.removeprefix(f"{path}."): e for name, e in entries.items() if name.startswith(f"{path}.")}, path
        )
        for path in paths
    }


def reading() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "marlin_w4a16 reads"]


@pytest.mark.parametrize("at_once", [1, 20_000, 1 << 30])
@pytest.mark.parametrize("backwards", [False, True])
def test_every_tensor_is_the_files(backwards, at_once, monkeypatch):
    model, found, expected = nn.Linear(1, 1), layers(), stored("modelopt-nvfp4", "llama")
    monkeypatch.setattr(ahead, "_AT_ONCE", at_once)
    reads = Ahead(model, found, CPU)
    assert len(found) == 14 and copy.deepcopy(reads) is reads
    for path in sorted(found, reverse=backwards):
        for leaf, tensor in reads.take(path).items():
            bits, right = (one.reshape(-1).view(torch.uint8) for one in (tensor, expected[f"{path}.{leaf}"]))
            assert torch.equal(bits, right), (path, leaf)


def test_what_fails_is_told_where_it_is_taken(monkeypatch):
    model, found = nn.Linear(1, 1), layers()
    monkeypatch.setattr(ahead, "_AT_ONCE", 1)
    bad, good = list(found)[:2]
    found[bad] = Layer(found[bad].entries, "another")
    reads = Ahead(model, found, CPU)
    assert reads.take(good)
    with pytest.raises(CheckpointError, match="found another file than before"):
        reads.take(bad)


def test_the_thread_ends_with_its_model(monkeypatch):
    go, started = threading.Event(), threading.Event()

    class Slow(Layer):
        def name(self, leaf: str) -> str:
            started.set()
            assert go.wait(10)
            return super().name(leaf)

    monkeypatch.setattr(ahead, "_AT_ONCE", 1)
    model, found = nn.Linear(1, 1), layers()
    first = next(iter(found))
    others = reading()
    found[first] = Slow(found[first].entries, first)
    Ahead(model, found, CPU)
    (thread,) = (one for one in reading() if one not in others)
    assert started.wait(10)
    del model
    gc.collect()
    go.set()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "device_map, expected",
    [
        (None, "cpu"), ({"": "cuda:1"}, "cuda:1"), ({"": torch.device("cpu")}, "cpu"),
        ({"": "disk"}, None), ({"": "meta"}, None), ({"model": "cpu"}, None), ({"": "cpu", "lm_head": "disk"}, None),
    ],
)  # fmt: skip
def test_one_device(device_map, expected):
    assert one_device(device_map) == (None if expected is None else torch.device(expected))


def test_a_model_leaves_no_thread_behind():
    others = reading()
    assert load("modelopt-nvfp4", "llama") is not None
    for thread in reading():
        thread.join(10)
    assert set(reading()) <= set(others)


def test_the_current_device_is_the_callers(monkeypatch):
    """A thread has one of its own."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert one_device({"": "cuda"}) == torch.device("cuda", 3)
    assert one_device({"": "cuda:1"}) == torch.device("cuda", 1)
