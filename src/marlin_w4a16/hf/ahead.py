"""Reads linears from their files while transformers loads the rest of a model."""

import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.reader import Reader

_Found = dict[str, "Future[dict[str, Tensor]]"]


class Ahead:
    """Reads layers to a device, one after the other, by a thread that ends with them or with their model.

    Args:
        model: whose layers they are.
        layers: by path, in the order in which they will be taken.
        device: one that computes.
    """

    def __init__(self, model: PreTrainedModel, layers: Mapping[str, Layer], device: torch.device) -> None:
        self._found: _Found = {path: Future() for path in layers}
        given = dict(layers), dict(self._found), device, weakref.ref(model)
        Thread(target=_read, args=given, name="marlin_w4a16 reads", daemon=True).start()

    def __deepcopy__(self, memo: Any) -> "Ahead":
        """Itself: transformers (5.23) copies renamings while it loads, and with them the quantizer."""
        return self

    def take(self, path: str) -> dict[str, Tensor]:
        """The tensors of a layer by leaf, as soon as they are read.

        Raises:
            CheckpointError: see `Reader.stacked`.
        """
        return self._found.pop(path).result()


def _read(layers: dict[str, Layer], found: _Found, device: torch.device, model: "weakref.ref[Any]") -> None:
    with Reader(device) as reader:
        while layers and model() is not None:
            path = next(iter(layers))
            layer, read = layers.pop(path), found.pop(path)
            try:
                read.set_result(reader.tensors(layer))
            except BaseException as error:  # raised where they are taken
                read.set_exception(error)


def one_device(device_map: Any) -> torch.device | None:
    """The device to which all of a model goes and on which it computes; None where there is none."""
    if device_map is None:
        return torch.device("cpu")
    whole = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else None
    device = None if whole in (None, "disk") else torch.device(whole)
    return None if device is None or device.type == "meta" else device
