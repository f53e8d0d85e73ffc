"""GGUF files in transformers: tensors in MXFP4 and NVFP4 stay packed, all others are loaded as transformers does it.

``from_pretrained(folder, gguf_file="x.gguf")`` asks the quantizer of the method ``gguf``, in transformers 5.23 and
5.24, and takes the state dict from it. A file without FP4 is left to transformers' own.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

from marlin_w4a16.checkpoints import gguf
from marlin_w4a16.checkpoints.files import CheckpointError, Entry
from marlin_w4a16.checkpoints.gguf_header import Header, header
from marlin_w4a16.checkpoints.gpt_oss import EXPERTS
from marlin_w4a16.checkpoints.layers import Contents
from marlin_w4a16.checkpoints.reader import Reader
from marlin_w4a16.hf.configs import Mxfp4Config
from marlin_w4a16.hf.dense_modules import packed_in
from marlin_w4a16.hf.experts.modules import CheckpointExperts
from marlin_w4a16.hf.gguf_placing import GGUFModel, placed
from marlin_w4a16.hf.linear import StoredLinear
from marlin_w4a16.hf.loading import FP4Loading
from marlin_w4a16.hf.saved import checkpoint_of

OPENAI = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}  # of gpt-oss


class GGUFQuantizer(FP4Loading, GgufHfQuantizer):  # type: ignore[misc]  # it names one keyword
    """Files of GGUF; those that have no FP4 are left to transformers' own class."""

    _header: Header | None = None
    _placed: GGUFModel | None = None

    def read_header(self, gguf_file: str) -> None:
        """Looks for FP4 in a file; transformers' own class does not know its types."""
        found = header(Path(gguf_file)) if find_spec("gguf") is not None else None
        if found is None or not gguf.fp4(found):
            super().read_header(gguf_file)
            return
        self._header, self.scheme = found, gguf.scheme(found)

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """That of the model: float32 where none is asked for, as transformers loads GGUF."""
        if self.scheme is None:
            return super().update_dtype(dtype)  # type: ignore[arg-type]
        self.model_dtype = self.dtype = torch.get_default_dtype() if dtype is None else dtype
        return self.model_dtype

    def _contents(self, name: str, checkpoint_files: list[Path], model: PreTrainedModel) -> Contents:
        if self._header is None or self.scheme is None:
            raise CheckpointError(f"{name}: found no header, expected that of a GGUF file: name it by gguf_file")
        with torch.device("cpu"):  # where a model is made, new tensors are on the meta device
            self._placed = placed(self._header, self.scheme, model)
        return self._placed.held

    def get_state_dict(self, checkpoint_file: str, model: PreTrainedModel) -> dict[str, Any]:
        """What transformers loads: all that is dense, and linears where a device map spreads the model."""
        if self._placed is None:
            state: dict[str, Any] = super().get_state_dict(checkpoint_file, model)
            return state
        found: dict[str, Any] = {**self._placed.values(self.model_dtype)}
        for path, module in model.named_modules():
            if isinstance(module, StoredLinear) and not module.alone:
                found |= {f"{path}.{leaf}": _Later(entry) for leaf, entry in module.layer.entries.items()}
        return found

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """The state dict in ModelOpt's format, as after ``quantize``, or in OpenAI's; the config is given its own.

        Raises:
            CheckpointError: there is no such checkpoint of the model.
        """
        if self.scheme is None or getattr(model, "_hf_peft_config_loaded", False):
            return super().get_state_dict_and_metadata(model)
        stored = next((path for path, module in model.named_modules() if isinstance(module, StoredLinear)), None)
        if stored is not None:
            raise CheckpointError(f"{stored}: found a layer that is offloaded, expected all on devices to save them")
        experts = [module for module in model.modules() if isinstance(module, CheckpointExperts)]
        if len(packed_in(model)) > len(experts) or any(one.mixture.second.storage != EXPERTS for one in experts):
            return checkpoint_of(model), {}
        state, metadata = super().get_state_dict_and_metadata(model)
        model.config.quantization_config = Mxfp4Config.like(Mxfp4Config(), dict(OPENAI))  # gpt-oss, as OpenAI has it
        return state, metadata


class _Later:
    """A tensor that is read once transformers asks for its values, as those of safetensors are."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry

    def __getitem__(self, _: Any) -> Tensor:
        with Reader(torch.device("cpu")) as reader:
            return reader.tensor(self._entry, str(self._entry.file))

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return self._entry.dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._entry.shape)
