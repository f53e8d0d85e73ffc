"""What transformers makes of the tensors of a GGUF file; all of its private interfaces that this takes stand here.

Read in transformers 5.23 and 5.24 (``modeling_gguf_pytorch_utils.py``): a map of names, and for some architectures a
processor that changes tensors, such as the rows of llama's queries, which llama.cpp's converter permutes. Where the
rows of a matrix go is told by numbers that are put through the processor.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as theirs

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
        config = model.config.get_text_config().to_dict()
        kind = _PROCESSORS.get(header.architecture) or theirs.TENSOR_PROCESSORS.get(
            header.architecture, theirs.TensorProcessor
        )
        self._processor = kind(config=config)
        try:
            self._map: dict[str, str] = theirs.get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{header.file}: general.architecture: found {header.architecture!r} with FP4, expected one whose "
                "tensors transformers finds by gguf's map of names, as those of llama, qwen3, qwen3moe and gpt-oss"
            ) from error

    def name(self, tensor: str) -> str | None:
        """The parameter that a tensor becomes, or is a part of; None: transformers does not load it."""
        return self._map.get(tensor) or self._map.get(tensor.removesuffix(".weight"))

    def made(self, tensor: str, values: Tensor, made: dict[str, Tensor]) -> None:
        """Adds to ``made`` what a tensor becomes, given its values in float32."""
        held: dict[str, Any] = {"tensors": made}
        found = self._processor.process(
            weights=values.numpy(), name=tensor, tensor_key_mapping=self._map, parsed_parameters=held
        )
        if found.name in self._map:
            made[self._map[found.name]] = torch.from_numpy(found.weights.copy())

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
