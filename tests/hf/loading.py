"""Models of the matrix: fresh ones to be changed, and ones that are read by many tests."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from checkpoints.formats import written
from checkpoints.names import renamed
from hf.dense import codes_of, dense, tensors_of
from hf.dense_experts import EXPERT, is_expert

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
    from marlin_w4a16.hf import configs

    classes = {"modelopt": configs.ModelOptConfig, "ct": configs.CompressedTensorsConfig}
    classes |= {"gpt": configs.Mxfp4Config, "deepseek": configs.FineGrainedFP8Config}
    return classes[name.partition("-")[0]](**options)


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


@functools.cache
def routing(name: str, family: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The experts of each token of the prompts and their weights in float32, by the path of the Experts module."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    model = reference(name, family, torch.float32)
    with ExitStack() as stack:
        for path, module in experts_of(model).items():
            hook = module.register_forward_pre_hook(lambda _, args, path=path: found.update({path: args[1:]}))
            stack.callback(hook.remove)
        logits(model)
    return found


@contextmanager
def routed(model: nn.Module, choices: dict[str, tuple[Tensor, Tensor]]) -> Iterator[nn.Module]:
    """With these experts for these tokens: a router in bfloat16 chooses others where two score almost alike."""
    with ExitStack() as stack:
        for path, (index, weights) in choices.items():

            def replace(_: nn.Module, args: Any, index: Tensor = index, weights: Tensor = weights) -> Any:
                return args[0], index, weights.to(args[2].dtype)

            stack.callback(model.get_submodule(path).register_forward_pre_hook(replace).remove)
        yield model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold all experts of a layer."""
    return {path: module for path, module in model.named_modules() if path.endswith(".experts")}


@functools.cache
def stored(name: str, family: str = "llama") -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names in the files."""
    return tensors_of(written(name, family))


@functools.cache
def model_type(name: str, family: str) -> str:
    """That of a checkpoint's config."""
    return json.loads((written(name, family) / "config.json").read_text())["model_type"]


@functools.cache
def kinds(name: str, family: str) -> dict[str, str]:
    """What each quantised module is expected to be by its path in the model: told from the tensors of the files.

    A module that holds all experts of a layer counts as one.
    """
    fp8 = "FP8Linear" if name.startswith("modelopt-") else "Linear"  # transformers loads those of all others
    found = {}
    for path, codes in codes_of(stored(name, family)).items():
        path = renamed(path, model_type(name, family))
        if is_expert(path):
            found[EXPERT.fullmatch(path)[1]] = "CheckpointExperts"
        else:
            found[path] = fp8 if codes.dtype == torch.float8_e4m3fn else "CheckpointLinear"
    return found


def linears(name: str, family: str) -> dict[str, str]:
    """Those of `kinds` that are linears."""
    return {path: kind for path, kind in kinds(name, family).items() if kind != "CheckpointExperts"}


def upstream_saves(name: str, dtype: torch.dtype) -> bool:
    """Whether transformers saves tensors in the dtype of the files: what its quantizer of FP8 has loaded."""
    return name.startswith("deepseek") and dtype == torch.bfloat16


def upstream_keeps(name: str, dtype: torch.dtype) -> bool:
    """Whether it holds them so too, and not in the float32 of its class: before 5.24."""
    return upstream_saves(name, dtype) and Version(transformers.__version__) < Version("5.24")


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal bit for bit, in dtype and shape too."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return False
    return torch.equal(found.contiguous().reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
