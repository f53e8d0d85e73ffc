"""What transformers makes of the tensors of a GGUF file; all of its private interfaces that this takes stand here.

Read in transformers 5.23 and 5.24: a map of names, and for some architectures a processor that changes tensors, such as
the rows of llama's queries, which llama.cpp's converter permutes (``modeling_gguf_pytorch_utils.py``); or, of a few,
conversions (``integrations/gguf``). Where the rows of a matrix go is told by numbers that are put through them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as theirs
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.gguf_header import Header


@dataclass(frozen=True, slots=True)
class Landing:
    """Where the rows of a matrix, or of each of a stack, go.

    Attributes:
        name: of the parameter.
        rows: the number there of each row of the file.
        height: how many rows the parameter has in all.
        turned: whether rows of the file are columns there.
    """

    name: str
    rows: Tensor
    height: int
    turned: bool


class GGUFNames:
    """The names and the changes by which transformers loads a file.

    Raises:
        CheckpointError: transformers knows nothing of the architecture.
    """

    def __init__(self, header: Header, model: PreTrainedModel) -> None:
        by_conversions = header.architecture in GGUF_ARCHS
        self._way: _Map | _Conversions = (_Conversions if by_conversions else _Map)(header, model)

    def name(self, tensor: str) -> str | None:
        """The parameter that a tensor becomes, or is a part of; None: transformers does not load it."""
        return self._way.name(tensor)

    def made(self, tensor: str, values: Tensor, made: dict[str, Tensor]) -> None:
        """Adds to ``made`` what a tensor becomes, given its values in float32."""
        self._way.made(tensor, values, made)

    def landing(self, tensor: str, shape: tuple[int, ...]) -> Landing | None:
        """Where the rows of a matrix or of a stack go; None: nowhere, or it is changed in another way."""
        stacked, n = len(shape) == 3, shape[-2]
        numbers = torch.arange(1, 2 * n + 1, dtype=torch.float32).view(n, 2)
        made: dict[str, Tensor] = {}
        try:
            self.made(tensor, numbers[None] if stacked else numbers, made)
        except Exception:  # whatever a processor raises of a matrix that is not as wide as the model is
            return None
        if len(made) != 1:
            return None
        ((name, found),) = made.items()
        found = found[0] if stacked and found.ndim == 3 else found
        turned = found.ndim == 2 and found.shape[0] == 2 != found.shape[1]
        found = found.T if turned else found
        if found.ndim != 2 or found.shape[1] != 2:
            return None
        at = found[:, 0].nonzero()[:, 0]
        order = (found[at, 0].long() - 1) // 2
        if at.numel() != n or not torch.equal(found[at], numbers[order]):
            return None
        return Landing(name, at[order.argsort()], len(found), turned)


class _Map:
    """Architectures of which gguf has names; for some, transformers has a processor of tensors."""

    def __init__(self, header: Header, model: PreTrainedModel) -> None:
        name = header.architecture
        kind = _PROCESSORS.get(name) or theirs.TENSOR_PROCESSORS.get(name, theirs.TensorProcessor)
        self._processor = kind(config=model.config.get_text_config().to_dict())
        try:
            self._map: dict[str, str] = theirs.get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{header.file}: general.architecture: found {name!r} with FP4, expected one whose tensors gguf has "
                "names for, such as llama, qwen3, qwen3moe and gpt-oss"
            ) from error

    def name(self, tensor: str) -> str | None:
        return self._map.get(tensor) or self._map.get(tensor.removesuffix(".weight"))

    def made(self, tensor: str, values: Tensor, made: dict[str, Tensor]) -> None:
        held: dict[str, Any] = {"tensors": made}
        found = self._processor.process(
            weights=values.numpy(), name=tensor, tensor_key_mapping=self._map, parsed_parameters=held
        )
        if found.name in self._map:
            made[self._map[found.name]] = torch.from_numpy(found.weights.copy())


class _Conversions:
    """Architectures whose tensors transformers renames and converts as it does those of safetensors (qwen35)."""

    def __init__(self, header: Header, model: PreTrainedModel) -> None:
        conversions = get_gguf_conversion_mapping(header.architecture, model.config)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def name(self, tensor: str) -> str | None:
        return name if (name := self._renamed(tensor)[0]) in self._state else None

    def made(self, tensor: str, values: Tensor, made: dict[str, Tensor]) -> None:
        name, pattern = self._renamed(tensor)
        if name not in self._state:
            return
        if pattern is None:
            made[name] = values
            return
        converter = self._by_pattern[pattern]
        sources, operations = converter.source_patterns, converter.operations
        if len(sources) == 1:
            for operation in operations:
                changed: dict[str, Any] = operation.convert({pattern: values}, [pattern], [name])
                values = next(iter(changed.values()))
            made[name] = values
            return
        (joins,) = operations
        if not isinstance(joins, Concatenate):
            raise TypeError(f"{tensor}: found {type(joins).__name__} of several tensors, expected Concatenate")
        shape = list(values.shape)
        shape[joins.dim] *= len(sources)
        whole = made.setdefault(name, values.new_zeros(shape))
        whole.narrow(joins.dim, sources.index(pattern) * values.shape[joins.dim], values.shape[joins.dim]).copy_(values)

    def _renamed(self, tensor: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(tensor, self._renamings, self._converters, self._prefix, self._state)
        return str(name), pattern


class _GptOss(theirs.TensorProcessor):
    """gpt-oss as llama.cpp writes it; the processor that transformers has waits for other names.

    In the class of transformers gate and up alternate, column by column, since its weights are transposed.
    """

    _STACK = re.compile(r"blk\.\d+\.ffn_(?P<which>gate|up|down)_exps\.(?P<leaf>weight|bias)")

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        """Adds the names of what gguf knows no name of: gates and ups, and the biases of experts."""
        found = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(_bias)?", qual_name + hf_name)
        if found is not None:
            leaf = "bias" if found[3] else "weight"
            for which in ("gate", "up") if found[2] == "gate_up" else ("down",):
                gguf_to_hf_name_map[f"blk.{found[1]}.ffn_{which}_exps.{leaf}"] = qual_name + hf_name

    def process(self, weights: Any, name: str, **kwargs: Any) -> Any:
        """See `TensorProcessor`."""
        names: Mapping[str, str] = kwargs["tensor_key_mapping"]
        name = name if name in names else name.removesuffix(".weight")  # attn_sinks, ffn_down_exps
        found = self._STACK.fullmatch(name if name.endswith("bias") else f"{name.removesuffix('.weight')}.weight")
        if found is None:
            return theirs.GGUFTensor(weights, name, {})
        weights = weights.swapaxes(-1, -2) if found["leaf"] == "weight" else weights
        if found["which"] == "down":
            return theirs.GGUFTensor(weights, name, {})
        values, made = torch.from_numpy(weights), kwargs["parsed_parameters"]["tensors"]
        *shape, rows = values.shape
        whole = made.setdefault(names[name], values.new_zeros((*shape, 2 * rows)))
        whole[..., ("gate", "up").index(found["which"]) :: 2] = values
        return theirs.GGUFTensor(weights, "", {})  # no tensor bears that name


_PROCESSORS: dict[str, Any] = {"gpt-oss": _GptOss}
