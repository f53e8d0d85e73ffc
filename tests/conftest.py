import functools
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from _pytest.logging import catching_logs
from torch import Tensor, nn

from checkpoints import formats
from marlin_w4a16 import E2M1_VALUES, FP4Weight, quantize_nvfp4
from marlin_w4a16.kernels.target import Target

gc.disable()  # until all tests are collected


def _on_the_root(self: Any) -> logging.Handler:
    """What pytest 9 does six times a test, without a look through all loggers for those that do not propagate.

    Of these there are a hundred, and torch writes its trace out where that has a handler.
    """
    root, level = logging.getLogger(), self.level
    if level is not None:
        self.handler.setLevel(level)
        self.orig_level = root.level
        root.setLevel(min(root.level, level))
    root.addHandler(self.handler)
    self.attached_loggers.append(root)
    return self.handler


if "attached_loggers" in getattr(catching_logs, "__slots__", ()):
    catching_logs.__enter__ = _on_the_root

# tensors this small are slower on several threads, which spin while they wait: up to ten times in several workers
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no process that waits for kernels of GPUs beside each that compiles


@functools.cache
def missing_gpu() -> str | None:
    """Why tests marked ``gpu`` cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return Target.of(torch.device("cuda")).why_not


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--wide", action="store_true", help="also run what is marked wide: the whole matrices")


def pytest_configure(config: pytest.Config) -> None:
    """Inductor writes scalar loops, but with ``--wide``: g++ takes two thirds of the time, and tries no vectors."""
    if not config.getoption("--wide"):
        os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--wide"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("wide")])
        items[:] = [item for item in items if not item.get_closest_marker("wide")]
    items.sort(key=lambda item: item.path.name != "test_examples.py")  # the longest first: no worker waits at the end
    for item in items:
        if item.get_closest_marker("gpu") and (reason := missing_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of one format of checkpoints run on one worker, which loads each model once.

    Not by ``xdist_group``: pytest-xdist 3.8 does not see that mark under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFormat(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            given = nodeid.partition("[")[2] if nodeid.startswith("tests/hf/") else ""
            return max((name for name in formats.FORMATS if name in given), key=len, default=nodeid)

    return ByFormat(config, log)


def pytest_collection_finish() -> None:
    """What has been imported stays: garbage is looked for among what comes after it, and less often than by default."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 1000)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Workers of a run share them."""
    folder = tmp_path_factory.getbasetemp()
    formats.store = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True, scope="module")
def no_old_garbage(request: pytest.FixtureRequest) -> None:
    """What a file's tests collect, themselves or by measuring, came after all other files: a second less each time."""
    if {"gc", "measure", "bench"} & vars(request.module).keys():
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Not by ``torch.manual_seed`` without a GPU: it keeps a stack trace for each kind of device."""
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled graph outlives its test; costs nothing where Dynamo was never loaded."""
    if "torch._dynamo.guards" in sys.modules:
        # flushes the caches of the CPU, 40 ms a graph, to log how long its guards take
        monkeypatch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def without_inductor() -> Iterator[None]:
    """What the backend makes of a graph runs eagerly: where it is held against eager, Inductor only takes seconds."""
    with patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward):
        yield


class FP4Linear(nn.Module):
    """A linear as a model author writes it: codes, scales and a global factor, decoded by a table in forward."""

    device = "cpu"

    def __init__(
        self,
        n: int = 48,
        k: int = 64,
        quantize: Callable[[Tensor], FP4Weight] = quantize_nvfp4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        weight = quantize(torch.randn(n, k))
        self.dtype = dtype
        self.codes = nn.Parameter(weight.codes, requires_grad=False)
        self.scales = nn.Parameter(weight.scales, requires_grad=False)
        self.register_buffer("factor", weight.multiplier[0].clone())
        self.register_buffer("table", torch.tensor(E2M1_VALUES))
        self.kind = torch.float8_e4m3fn if weight.kind == "e4m3" else torch.float8_e8m0fnu
        self.to(self.device)

    def weight(self) -> Tensor:
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()
        blocks = self.table[codes].unflatten(-1, (self.scales.shape[-1], -1))
        scales = self.scales.view(self.kind).float() * self.factor
        return (blocks * scales.unsqueeze(-1)).flatten(-2).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight())


@pytest.fixture
def fp4_linear() -> type[FP4Linear]:
    return FP4Linear


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """What the backend has logged so far, as (level, message)."""
    caplog.set_level("INFO", "marlin_w4a16")
    return lambda: [(r.levelname, r.message) for r in caplog.records if r.name == "marlin_w4a16"]


@pytest.fixture
def levels(said: Callable[[], list[tuple[str, str]]]) -> Callable[[], list[str]]:
    """The levels of what the backend has logged so far."""
    return lambda: [level for level, _ in said()]


@pytest.fixture
def assert_near() -> Callable[[Tensor, Tensor], None]:
    """Two right programs agree so far in relative L2: the weight or the output of one is rounded where the other's
    is not."""
    limits = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

    def near(found: Tensor, expected: Tensor) -> None:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert (found.double() - expected.double()).norm() <= limits[expected.dtype] * expected.double().norm()

    return near
