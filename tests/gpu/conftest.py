import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every ``torch.empty``, outputs and workspaces alike, comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_the_gpu() -> Iterator[None]:
    """Tensors are made there."""
    with torch.device("cuda"):
        yield
