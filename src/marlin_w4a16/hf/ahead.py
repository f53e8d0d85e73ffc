"""Reads linears from their files while transformers loads the rest of a model."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.checkpoints.storage import DTYPES, FP4Storage
from marlin_w4a16.hf.linear import CheckpointLinear

_AT_ONCE = 128 << 20  # bytes: about a layer of a model

_Found = dict[str, Future[dict[str, Tensor]]]


class Ahead:
    """Reads layers to a device by a thread that ends with them or with their model.

    Args:
        model: whose layers they are.
        layers: by path, in the order in which they will be taken.
        device: one that computes.
        loads: what `load_kernels` has started.
    """

    def __init__(
        self, model: PreTrainedModel, layers: Mapping[str, Layer], device: torch.device, loads: Thread | None = None
    ) -> None:
        self._loads, self._found = loads, _Found((path, Future()) for path in layers)
        given = dict(layers), dict(self._found), device, weakref.ref(model)
        Thread(target=_read, args=given, name="marlin_w4a16 reads", daemon=True).start()

    def __deepcopy__(self, memo: Any) -> "Ahead":
        """Itself: transformers (5.23) copies renamings while it loads, and with them the quantizer."""
        return self

    def take(self, path: str) -> dict[str, Tensor]:
        """The tensors of a layer by leaf, as soon as they are read.

        Raises:
            CheckpointError: of it or of a layer that is read at once with it; see `Reader.stacked`.
        """
        if self._loads is not None:
            self._loads.join()
        return self._found.pop(path).result()


def _read(layers: Mapping[str, Layer], found: _Found, device: torch.device, model: "weakref.ref[Any]") -> None:
    with _current(device), Reader(device) as reader:
        for paths in _at_once(layers):
            if model() is None:
                return
            futures = [found.pop(path) for path in paths]
            try:
                read = reader.tensors([layers[path] for path in paths])
            except BaseException as error:  # raised where they are taken
                for future in futures:
                    future.set_exception(error)
            else:
                for future in futures:
                    future.set_result(read.pop(0))
                del future, futures


def _at_once(layers: Mapping[str, Layer]) -> Iterator[list[str]]:
    """The paths of those that are read at once, in order."""
    paths, nbytes = list[str](), 0
    for path, layer in layers.items():
        more = sum(entry.nbytes for entry in layer.entries.values())
        if paths and nbytes + more > _AT_ONCE:
            yield paths
            paths, nbytes = [], 0
        paths.append(path)
        nbytes += more
    if paths:
        yield paths


def load_kernels(layers: Iterable[Layer], device: torch.device | None, dtype: torch.dtype) -> Thread | None:
    """Has a thread pack a weight of ones, shaped as the first in FP4: a new process takes a second to load what packs.

    None where there is nothing to load.
    """
    fp4 = next((layer for layer in layers if isinstance(layer.storage, FP4Storage)), None)
    if device is None or device.type != "cuda" or fp4 is None:
        return None
    loads = Thread(target=_pack_ones, args=(fp4, device, dtype), name="marlin_w4a16 loads", daemon=True)
    loads.start()
    return loads


def _pack_ones(layer: Layer, device: torch.device, dtype: torch.dtype) -> None:
    shapes = {leaf: (entry.shape, DTYPES[entry.dtype]) for leaf, entry in layer.entries.items()}
    with _current(device), suppress(Exception):  # raised again where the first layer is packed
        ones = {leaf: torch.ones(shape, dtype=of, device=device) for leaf, (shape, of) in shapes.items()}
        CheckpointLinear(layer, ones, None, dtype, keep=False)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """A thread starts with the first device as the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def one_device(device_map: Any) -> torch.device | None:
    """The device to which all of a model goes and on which it computes; None where there is none."""
    if device_map is None:
        return torch.device("cpu")
    whole = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else None
    device = None if whole in (None, "disk") else torch.device(whole)
    if device is not None and device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())  # of the caller's thread
    return None if device is None or device.type == "meta" else device
