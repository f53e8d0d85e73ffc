"""Recordings of calls, with kernels and launchers that note what they are given."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels import private, record, recording, replay
from marlin_w4a16.kernels.record import Recording, Replays, multiply, scratch, submit
from marlin_w4a16.kernels.replay import Replay

X, W, OUT = (torch.zeros(64) for _ in range(3))
META = {"swizzle": 3, "elem_size": 2, "elem_type": 5, "block_size": (16, 64)}
CPU = torch.device("cpu")


@dataclass
class CudaLauncher:
    """As that of Triton 3.7 and later; ``launch`` is noted by the driver."""

    launch_pdl: bool = True
    launch_cooperative_grid: bool = False
    global_scratch_size: int = 0
    profile_scratch_size: int = 0
    arg_annotations: str = "annotations"
    kernel_signature: bytes = b"signature"


@dataclass
class Descriptor:
    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...] = (16, 64)


class Kernel:
    """``kernel[grid](x, w, out, n, SIZE, num_warps=4)``"""

    arg_names = ("x", "w", "out", "n", "SIZE", "PTX")

    def __init__(self, run: Any = None, metas: tuple[Any, ...] = ()) -> None:
        metadata = SimpleNamespace(tensordesc_meta=metas)
        run = CudaLauncher() if run is None else run
        self.compiled = SimpleNamespace(run=run, function=77, packed_metadata=(4, 1, 0), metadata=metadata)
        self.calls = 0

    fn = staticmethod(lambda x, w, out, n, SIZE, PTX=True: None)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return self.compiled

        return launch


@dataclass
class Driver:
    """What was started."""

    started: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def utils(self) -> Any:
        return SimpleNamespace(
            launch=lambda *args: self.started.append(args), fill_tma_descriptor_tiled=lambda *args: ("map", *args)
        )


@pytest.fixture
def driver(monkeypatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(private, "_driver", lambda: driver)
    for module in (record, recording):  # a build with CUDA asks its driver, which there may not be
        monkeypatch.setattr(module, "current_device", lambda: -2)
    monkeypatch.setattr(replay, "raw_stream", lambda device: 1234)
    monkeypatch.setattr(replay, "empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    private._fill.cache_clear()
    private.tensor_map.cache_clear()
    yield driver
    private._fill.cache_clear()
    private.tensor_map.cache_clear()


def recorded(call: Any, *tensors: Tensor) -> Replay | None:
    recording = Recording(tensors or (X, W, OUT))
    with recording.on():
        call()
    return recording.replay()


def test_arguments_are_addresses_and_constants_in_the_order_of_the_kernel(driver):
    kernel = Kernel()
    made = recorded(lambda: submit(kernel, (7, 3), X, W, OUT, 5, SIZE=64, num_warps=4))
    made((160, 320, 480))
    ((*_, arguments),) = driver.started
    assert driver.started[0][:8] == (7, 3, 1, 1234, 77, False, True, (4, 1, 0))
    assert driver.started[0][-3:-1] == ("annotations", b"signature")
    assert arguments == (160, 320, 480, 5, 64, True)
    assert kernel.calls == 1


@pytest.mark.parametrize("wrapped", [False, True], ids=["C", "behind one that makes descriptors"])
def test_the_launcher_of_triton_3_6(driver, wrapped):
    started: list[tuple[Any, ...]] = []
    launcher = partial(_note, started)

    def makes_descriptors(*args: Any) -> None:
        launcher(*args)

    run = type("CudaLauncher", (SimpleNamespace,), {})(
        launch=makes_descriptors if wrapped else launcher,
        launch_pdl=True, launch_cooperative_grid=False, global_scratch_size=0, profile_scratch_size=0,
    )  # fmt: skip
    kernel = Kernel(run)
    recorded(lambda: submit(kernel, (7,), X, W, OUT, 5, 64))((16, 32, 48))
    how = (77, False, True, None, None, (4, 1, 0), None, None, None)
    assert started == [(7, 1, 1, 1234, *how, 16, 32, 48, 5, 64, True)]


def _note(started: list[tuple[Any, ...]], *args: Any) -> None:
    started.append(args)


def test_scratch_is_made_anew_in_one_piece(driver):
    def call() -> None:
        first, second = scratch((3, 5), torch.float32, CPU), scratch(7, torch.int32, CPU)
        submit(kernel, (1,), first, second, OUT, 0, 64)
        submit(kernel, (1,), X, first, OUT, 0, 64)

    kernel = Kernel()
    made = recorded(call)
    made((16, 32, 48))
    (first, second, *_), (x, again, *_) = (args[-1] for args in driver.started)
    assert (again, x, second - first) == (first, 16, 256)


def test_descriptors_are_made_of_addresses_and_kept(driver):
    kernel = Kernel(metas=(META,))
    call = lambda: submit(kernel, (1,), Descriptor(X, (8, 8), (8, 1)), W, OUT, 0, 64)  # noqa: E731
    made = recorded(call)
    for _ in range(2):
        made((160, 32, 48))
    first, second = (args[-1] for args in driver.started)
    assert first[1:] == (8, 8, 8, 1, 32, 48, 0, 64, True)
    assert first[0] is second[0]
    assert first[0][:4] == ("map", 160, 3, 2)
    assert first[0][5:] == ((16, 64), (8, 8), (8, 1), 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda kernel: None,
        lambda kernel: submit(kernel, (1,), torch.zeros(64), W, OUT, 0, 64),
        lambda kernel: submit(kernel, (1,), X[16:], W, OUT, 0, 64),
        lambda kernel: (OUT.zero_(), submit(kernel, (1,), X, W, OUT, 0, 64)),
        lambda kernel: (X.clone(), submit(kernel, (1,), X, W, OUT, 0, 64)),
        lambda kernel: (torch.mm(X.view(8, 8), W.view(8, 8)), submit(kernel, (1,), X, W, OUT, 0, 64)),
    ],
    ids=["nothing", "another tensor", "the middle of one", "a write", "a copy", "a product"],
)
def test_what_does_more_than_launch_is_not_kept(driver, call):
    assert recorded(lambda: call(Kernel())) is None


@pytest.fixture
def products(monkeypatch) -> list[tuple[Tensor, ...]]:
    """Operands of the products of cuBLAS, which a CPU has none of from 16 bits into float32."""
    seen: list[tuple[Tensor, ...]] = []
    monkeypatch.setattr(torch, "mm", lambda *operands, out_dtype, out: seen.append((*operands, out)))
    return seen


def made_operands() -> tuple[Tensor, ...]:
    shapes = ((8, 16), torch.bfloat16), ((4, 16), torch.bfloat16), ((8, 4), torch.float32)
    return tuple(scratch(shape, dtype, CPU) for shape, dtype in shapes)


def test_products_are_made_again_between_launches(driver, products):
    def call() -> None:
        a, b, c = made_operands()
        row = scratch(3, torch.float32, CPU)
        submit(kernel, (1,), a, row, b, 0, 64)
        multiply(a, b.t(), c)
        submit(kernel, (1,), c.unsqueeze(0), row, OUT, 0, 64)

    kernel = Kernel()
    made = recorded(call)
    first = products.pop()
    made((16, 32, 48))
    ((a, b, c),) = products
    assert [(t.shape, t.stride(), t.dtype) for t in (a, b, c)] == [(t.shape, t.stride(), t.dtype) for t in first]
    before, after = (args[-1][:3] for args in driver.started)
    assert (before[0], before[2]) == (a.data_ptr(), b.data_ptr())
    assert after == (c.data_ptr(), before[1], 48)
    assert made.bind({1: W})((16, 48)) is None
    assert driver.started[-1][-1][2] == 48


@pytest.mark.parametrize(
    "multiplies",
    [
        lambda a, b, c: multiply(X.view(4, 16).bfloat16(), b.t(), c),
        lambda a, b, c: multiply(X.view(torch.bfloat16)[:128].view(8, 16), b.t(), c),
        lambda a, b, c: multiply(a[:4], b.t(), c[:4]),
        lambda a, b, c: multiply(a[:, :8], b.t()[:8], c),
        lambda a, b, c: (multiply(a, b.t(), c), multiply(b, a.t(), c.t())),
        lambda a, b, c: (multiply(a, b.t(), c), torch.ops.aten.mm(a, b.t())),
    ],
    ids=["what is no scratch", "an argument", "some rows", "some columns", "two views", "another product"],
)
def test_products_of_anything_but_whole_scratch_are_not_kept(driver, products, multiplies):
    def call() -> None:
        a, b, c = made_operands()
        submit(kernel, (1,), a, W, b, 0, 64)
        multiplies(a, b, c)
        submit(kernel, (1,), c, W, OUT, 0, 64)

    kernel = Kernel()
    assert recorded(call) is None


def test_views_are_no_operators_that_compute(driver):
    call = lambda: submit(Kernel(), (1,), X.view(8, 8).t(), W.view(torch.int32), OUT[:], 0, 64)  # noqa: E731
    assert recorded(call) is not None


@pytest.mark.parametrize(
    "run",
    [
        CudaLauncher(global_scratch_size=1),
        CudaLauncher(profile_scratch_size=1),
        SimpleNamespace(launch=None),
    ],
    ids=["scratch of the kernel", "that of a profiler", "another launcher"],
)
def test_launchers_that_do_more_are_not_kept(driver, run):
    assert recorded(lambda: submit(Kernel(run), (1,), X, W, OUT, 0, 64)) is None


def test_another_release_of_triton_is_not_known(driver, monkeypatch):
    monkeypatch.setattr(private, "gluon_is_known", lambda: False)
    assert recorded(lambda: submit(Kernel(), (1,), X, W, OUT, 0, 64)) is None


def test_tensors_at_one_address_are_not_told_apart(driver):
    call = lambda: submit(Kernel(), (1,), X, W, OUT, 0, 64)  # noqa: E731
    assert recorded(call, X, W, W.view(8, 8), OUT) is None


def test_a_recording_ends_with_its_call_even_if_that_raises(driver):
    def fails() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        recorded(fails)
    kernel = Kernel()
    submit(kernel, (1,), X, W, OUT, 0, 64)
    assert kernel.calls == 1


@pytest.fixture
def replays(driver, monkeypatch) -> Replays:
    """Those of a machine whose current GPU has the tensors of these tests."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(private, "hooked", lambda: False)
    monkeypatch.setattr(record, "hooked", lambda: False)
    return Replays()


def call_with(kernel: Kernel, x: Tensor = X) -> Any:
    return lambda: submit(kernel, (1,), x, W, OUT, 0, 64)


def test_a_call_runs_once_and_is_replayed(replays, driver):
    kernel, tensors = Kernel(), (X, W, OUT)
    assert not replays.run("key", tensors)
    replays.record("key", tensors, call_with(kernel))
    assert replays.run("key", tensors)
    assert not replays.run("other", tensors)
    assert (kernel.calls, len(driver.started)) == (1, 1)


def test_what_is_off_the_grid_runs_in_the_general_way_and_spoils_nothing(replays, driver):
    kernel, off = Kernel(), X[1:]
    replays.record("key", (off, W, OUT), call_with(kernel, off))
    assert not replays.run("key", (X, W, OUT))
    replays.record("key", (X, W, OUT), call_with(kernel))
    assert replays.run("key", (X, W, OUT))
    assert not replays.run("key", (off, W, OUT))


def test_what_cannot_be_kept_is_not_recorded_again(replays, driver):
    kernel = Kernel()
    for _ in range(2):
        replays.record("key", (X, W, OUT), lambda: (X.clone(), call_with(kernel)()))
        assert not replays.run("key", (X, W, OUT))
    assert kernel.calls == 2


def test_hooks_of_triton_see_every_launch(replays, driver, monkeypatch):
    kernel, tensors = Kernel(), (X, W, OUT)
    replays.record("key", tensors, call_with(kernel))
    monkeypatch.setattr(record, "hooked", lambda: True)
    assert not replays.run("key", tensors)
    replays.record("key", tensors, call_with(kernel))
    assert kernel.calls == 2
    monkeypatch.setattr(record, "hooked", lambda: False)
    assert replays.run("key", tensors)


def test_another_current_device_is_not_that_of_a_call(replays, driver, monkeypatch):
    replays.record("key", (X, W, OUT), call_with(Kernel()))
    monkeypatch.setattr(record, "current_device", lambda: 5)
    assert not replays.run("key", (X, W, OUT))


def test_the_oldest_calls_are_forgotten(replays, driver, monkeypatch):
    monkeypatch.setattr(record, "_MOST", 2)
    for key in "abc":
        replays.record(key, (X, W, OUT), call_with(Kernel()))
    assert [replays.run(key, (X, W, OUT)) for key in "abc"] == [False, True, True]


def test_hooks_are_seen():
    from triton import knobs

    seen = lambda metadata: None  # noqa: E731
    assert not private.hooked()
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(seen)
        assert private.hooked()
        chain.remove(seen)
    assert not private.hooked()
