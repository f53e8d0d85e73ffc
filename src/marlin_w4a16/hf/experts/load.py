"""Experts are read some at a time, and not by transformers, which would hold all of a model before any is packed.

What transformers has to know about them: which tensors it need not load, and how many bytes they will take.
"""

import re
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from marlin_w4a16.checkpoints.experts import StoredMixture
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.hf.placing import put


def own_names(model: PreTrainedModel, paths: Iterable[str]) -> list[str]:
    """A pattern of the names of tensors of modules that transformers need not load, if there are any."""
    paths = [path.removeprefix(f"{model.base_model_prefix}.") for path in paths]
    return [rf"(?:^|\.)(?:{'|'.join(map(re.escape, paths))})\."] if paths else []


def bytes_beside(model: PreTrainedModel, mixtures: Iterable[StoredMixture], itemsize: int | None) -> dict[str, int]:
    """Bytes of experts by the name of a parameter beside them, with which device maps count them.

    The model still has its Experts modules; ``itemsize`` is of an element, if they will be dense.
    """
    found = {}
    for mixture in mixtures:
        block, experts = mixture.path.rpartition(".")[0], f"{mixture.path}."
        names = (f"{block}.{name}" for name, _ in model.get_submodule(block).named_parameters())
        elements = sum(stack.experts * stack.like.n * stack.like.k for stack in mixture.stacks)
        beside = next((name for name in names if not name.startswith(experts)), None)
        if beside is not None:
            found[beside] = mixture.nbytes if itemsize is None else elements * itemsize
    return found


class Loader(ExitStack):
    """Puts experts and joined linears in their places; a context, for whose length the checkpoint's files stay open."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model, self._readers = model, dict[torch.device, Reader]()

    def settle(self, path: str, dense: torch.dtype | None) -> None:
        """Puts what runs in place of a `StoredExperts` or `StoredParts`: packed, or a dense module of a dtype.

        Raises:
            CheckpointError: a device map puts them on disk, or on the CPU beside a GPU though they are to be dense.
        """
        stored: Any = self._model.get_submodule(path)
        if hasattr(stored, "_hf_hook"):  # of accelerate: biases that it offloads come back
            from accelerate.hooks import remove_hook_from_module

            remove_hook_from_module(stored)
        device = self._device(path, dense is not None)
        for name, bias in stored._parameters.items():
            if bias is not None:
                stored._parameters[name] = torch.nn.Parameter(bias.detach().to(device), bias.requires_grad)
        if device not in self._readers:
            self._readers[device] = self.enter_context(Reader(device))
        reader = self._readers[device]
        put(self._model, path, stored.loaded(reader) if dense is None else stored.dense(reader, dense))

    def _device(self, path: str, dense: bool) -> torch.device:
        """Where a device map puts experts."""
        device_map: dict[str, Any] = getattr(self._model, "hf_device_map", None) or {}
        keys = [key for key in device_map if not key or f"{path}.".startswith(f"{key}.")]
        device = device_map[max(keys, key=len)] if keys else self._model.device
        if str(device) == "disk":
            raise CheckpointError(
                f"{path}: found weights on disk, expected them on a GPU or the CPU: change device_map"
            )
        if dense and str(device) == "cpu" and any(str(other) != "cpu" for other in device_map.values()):
            raise CheckpointError(
                f"{path}: found weights that are offloaded, expected all on devices to dequantize them"
            )
        return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
