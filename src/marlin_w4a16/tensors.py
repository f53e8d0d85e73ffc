"""Every tensor that a model holds: packed ones are neither parameters nor buffers."""

from collections.abc import Iterator

from torch import Tensor, nn


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a model and the tensors among its modules' attributes, each once."""
    attributes = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    found = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *attributes)}
    yield from found.values()
