"""Tells compiled graphs of writes that leave no trace."""

from torch import nn

from marlin_w4a16.passes.graph.torch_private import inner_tensors, mark_written
from marlin_w4a16.tensors import held_tensors


def refresh(model: nn.Module) -> None:
    """Says that the weights of a model may have been written to in a way that PyTorch cannot see.

    Such ways are ``p.data.copy_(...)``, a numpy view, another process, and any write to an inference tensor. The next
    call of each compiled graph verifies the weights it is called with and packs them again, at the same addresses.
    Needed for the bare backend only; weights that did not change stay what they are.

    Args:
        model: the model, compiled or not, or a part of it. Its parameters, its buffers and the tensors among its
            modules' attributes count as written.
    """
    mark_written(part for tensor in held_tensors(model) for part in inner_tensors(tensor))
