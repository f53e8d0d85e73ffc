"""The names that transformers gives to a checkpoint's tensors, and what it makes of them; 5.17 to 5.24 were read."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from marlin_w4a16.checkpoints.files import Entry
from marlin_w4a16.checkpoints.layers import Layer
from marlin_w4a16.checkpoints.storage import DTYPES
from marlin_w4a16.hf.experts.gather import Destination


class OwnNames(WeightRenaming):
    """Gives tensors back the names of their files when they are saved, each exactly.

    Renamings that are turned around may change other names too: Kimi-K2's ``blocks`` to ``layers`` of the vision tower
    makes blocks of the language model's layers.

    Args:
        names: of all tensors in the files.
        renamings: with which transformers loaded them; names that are in no file are given back by these.
    """

    __slots__ = ("_names", "_others", "_paths")

    def __init__(self, names: Iterable[str], renamings: Sequence[WeightRenaming]) -> None:
        super().__init__("(?!)", "(?!)")
        self._others = [renaming.reverse_transform() for renaming in reversed(renamings)]
        self._names, self._paths = dict[str, str](), dict[str, str]()
        own = list(names)
        for name in own:
            become = name
            for renaming in renamings:
                become = renaming.rename_source_key(become)[0]
            self._names[become] = name
            path, _, leaf = become.rpartition(".")
            if name.endswith(f".{leaf}"):
                self._paths[path] = name[: -len(leaf) - 1]
        for name in own:
            self._names.setdefault(name, name)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The name in the files of what a model holds under a name; no pattern."""
        path, _, leaf = source_key.rpartition(".")
        if source_key in self._names:
            return self._names[source_key], None
        if path in self._paths:
            return f"{self._paths[path]}.{leaf}", None
        for renaming in self._others:
            source_key = renaming.rename_source_key(source_key)[0]
        return source_key, None

    def reverse_transform(self) -> "OwnNames":
        """Itself: it is used when a model is saved alone."""
        return self


def keep_names(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Has transformers save a model that it has just loaded under the names of its files."""
    used = getattr(model, "_weight_conversions", None) or ()
    renamings = [one for one in used if isinstance(one, WeightRenaming)]
    if renamings:
        others = [one for one in used if not isinstance(one, WeightRenaming)]
        setattr(model, "_weight_conversions", [OwnNames(names, renamings), *others])  # noqa: B010


class Renaming:
    """The names that transformers gives to the tensors of a checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._model, self._prefix, self.state = model, model.base_model_prefix, model.state_dict()

    def __call__(self, name: str) -> str:
        """The name of the first parameter that a tensor becomes, or is a part of."""
        return self._renamed(name)[0]

    def target(self, layer: Layer) -> Destination:
        """Where transformers would put a layer."""
        path = layer.fp4.placed(layer.path) if layer.experts else layer.path
        name, pattern = self._renamed(f"{path}.weight" if layer.storage.joint == "." else path)
        converter = self._by_pattern[pattern] if pattern is not None else None
        if converter is None or pattern is None:
            return Destination(name)
        operations = tuple(type(operation).__name__ for operation in converter.operations)
        return Destination(name, converter.source_patterns.index(pattern), len(converter.source_patterns), operations)

    def made(self, entries: Mapping[str, Entry]) -> dict[str, tuple[Entry, tuple[int, ...]] | str]:
        """The parameters that tensors become, by name: one of these tensors and the shape, or what went wrong."""
        found: dict[str, tuple[Entry, tuple[int, ...]] | str] = {}
        converted: dict[str, list[tuple[str, str, Entry]]] = {}
        for name, entry in entries.items():
            target, pattern = self._renamed(name)
            if pattern is None:
                found[target] = entry, entry.shape
            elif target in self.state:
                converted.setdefault(target, []).append((pattern, name, entry))
        for target, sources in converted.items():
            found |= self._converted(target, sources)
        return found

    def _converted(
        self, target: str, sources: list[tuple[str, str, Entry]]
    ) -> dict[str, tuple[Entry, tuple[int, ...]] | str]:
        converter = deepcopy(self._by_pattern[sources[0][0]])
        for pattern, name, entry in sources:
            empty = torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, torch.uint8), device="meta")
            converter.add_tensor(target, name, pattern, empty)  # type: ignore[arg-type]  # as when it saves
        try:
            made = converter.convert(target, model=self._model, config=self._model.config)
        except Exception as error:  # whatever code of transformers raises of tensors that it does not expect
            names = " and ".join(name for _, name, _ in sources[:4])
            return {target: f"{names}, of which transformers cannot make it ({type(error).__name__}: {error})"}
        tensors: dict[str, Tensor] = {name: t[0] if isinstance(t, list) else t for name, t in made.items()}
        return {name: (sources[0][2], tuple(tensor.shape)) for name, tensor in tensors.items()}

    def _renamed(self, name: str) -> tuple[str, str | None]:
        new, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self.state)
        if new not in self.state and name in self.state:  # as in transformers' convert_and_load_state_dict_in_model
            new, pattern = rename_source_key(name, [], [], self._prefix, self.state)
        return str(new), pattern
