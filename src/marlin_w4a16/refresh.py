"""Tells compiled graphs of writes that leave no trace."""

from collections.abc import Iterator

from torch import Tensor, nn

from marlin_w4a16.passes.graph.torch_private import inner_tensors, mark_written


def refresh(model: nn.Module) -> None:
    """Says that the weights of a model may have been written to in a way that PyTorch cannot see.

    Such ways are ``p.data.copy_(...)``, a numpy view, another process, and any write to an inference tensor. The next
    call of each compiled graph verifies the weights it is called with and packs them again, at the same addresses.
    Needed for the bare backend only; weights that did not change stay what they are.

    Args:
        model: the model, compiled or not, or a part of it. Its parameters, its buffers and the tensors among its
            modules' attributes count as written.
    """
    mark_written(part for tensor in _tensors(model) for part in inner_tensors(tensor))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))
