"""Which tensors of a model lie in the same memory."""

import torch
from torch import Tensor, nn

from marlin_w4a16.producers.found import holds_values
from marlin_w4a16.quantize.dense import is_plain


class Shared:
    """The memory of a model's parameters and buffers. Holds addresses only, no tensor."""

    def __init__(self, model: nn.Module) -> None:
        self._spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
        for prefix, module in model.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if is_plain(tensor) and holds_values(tensor):
                    span = *_span(tensor), f"{prefix}.{name}".lstrip(".")
                    self._spans.setdefault(_memory(tensor), []).append(span)

    def others(self, path: str, weight: Tensor) -> list[str]:
        """The paths of other tensors in the memory of the weight at a path."""
        start, stop = _span(weight)
        spans = self._spans[_memory(weight)]
        return [name for first, last, name in spans if first < stop and start < last and name != path]


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of a tensor in its storage and the one past its last, in bytes."""
    if not tensor.numel():
        return 0, 0
    first = int(tensor.storage_offset())
    last = first + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def look(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common that are the same numbers in the same memory."""
    return *_memory(tensor), _span(tensor), tensor.dtype, tensor.shape, tensor.stride()
