"""Models of the matrix: fresh ones to be changed, and ones that are read by many tests."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from checkpoints.formats import written
from hf.dense import codes_of, dense, tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEEDS, STEPS = 8, 32
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def prompts(vocabulary: int = 208) -> Tensor:
    """Tokens ``[SEEDS, STEPS]``, each row drawn with a seed of its own."""
    drawn = (torch.randint(0, vocabulary, (STEPS,), generator=torch.Generator().manual_seed(s)) for s in range(SEEDS))
    return torch.stack(list(drawn))


def load(name: str, family: str = "llama", shards: bool = False, **options: Any) -> PreTrainedModel:
    """A model of the checkpoint's own dtype, unless options say otherwise."""
    return read(written(name, family, shards), **options)


def read(folder: Any, **options: Any) -> Any:
    """What transformers loads from a folder."""
    from transformers import AutoModelForCausalLM

    import marlin_w4a16.hf  # noqa: F401, the plugin

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def choosing(name: str, **options: Any) -> Any:
    """The config of a format's producer with such options."""
    from marlin_w4a16.hf import CompressedTensorsConfig, ModelOptConfig

    return (ModelOptConfig if name.startswith("modelopt") else CompressedTensorsConfig)(**options)


@functools.cache
def loaded(name: str, family: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model to be read, not to be changed."""
    return load(name, family, dtype=dtype)


@functools.cache
def reference(name: str, family: str, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model to be read, not to be changed."""
    return dense(written(name, family), dtype)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None, **options: Any) -> Tensor:
    """Those of the prompts, without a cache."""
    return model(prompts() if tokens is None else tokens, use_cache=False, **options).logits


def stored(name: str, family: str = "llama") -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    return tensors_of(written(name, family))


def kinds(name: str, family: str) -> dict[str, str]:
    """What each linear of a model is expected to be by its path: told from the tensors of the files."""
    fp8 = "Linear" if name.startswith("ct-") else "FP8Linear"  # transformers loads those of compressed-tensors
    codes = codes_of(stored(name, family)).items()
    return {path: "CheckpointLinear" if codes.dtype == torch.uint8 else fp8 for path, codes in codes}


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, in dtype and shape too."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.contiguous().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
