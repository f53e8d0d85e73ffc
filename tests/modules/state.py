"""The tensors of a module's state."""

import torch
from torch import Tensor, nn

from marlin_w4a16.tensors import held_tensors


def bits(module: nn.Module) -> dict[str, Tensor]:
    """Copies of them."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In the same order, with the same dtypes and values."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def addresses(module: nn.Module) -> list[int]:
    """Where they lie, but for what says how they are packed."""
    return [t.data_ptr() for t in held_tensors(module) if t.numel()]
