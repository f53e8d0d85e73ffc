import functools
import sys
from collections.abc import Iterator

import pytest
import torch


@functools.cache
def missing_gpu() -> str | None:
    """Why tests marked ``gpu`` cannot run here, or None if they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    capability = torch.cuda.get_device_capability()
    if (8, 0) <= capability < (10, 0):
        return None
    return f"needs a compute capability from 8.0 to below 10.0, this device has {capability[0]}.{capability[1]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and (reason := missing_gpu()):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled graph outlives its test; costs nothing where Dynamo was never loaded."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
