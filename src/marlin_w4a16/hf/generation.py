"""generate(): decode is compiled by this backend where the cache is static, or block by block where it is not."""

import inspect
from collections.abc import Iterator

from torch import nn
from transformers import CompileConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from marlin_w4a16.modules.packed_experts import PackedExperts
from marlin_w4a16.modules.packed_linear import PackedLinear

BACKEND = "marlin_w4a16"
_CACHES = {"cache", "past_key_values", "past_key_value", "cache_params"}  # the first from transformers 5.24 on


def compile_decode(model: PreTrainedModel) -> None:
    """Sets how generate() compiles, where the model can generate and nobody has set it.

    transformers compiles decode where the cache is static (``cache_implementation="static"``), and prefill where it
    comes in chunks (``prefill_chunk_size=...``). ``model.generation_config.compile_config`` can be set to another
    config, or to None for transformers' own; it is not saved with the model.
    """
    config = getattr(model, "generation_config", None)
    if config is not None and model.can_generate() and config.compile_config is None:
        config.compile_config = CompileConfig(backend=BACKEND)


def compile_blocks(model: nn.Module, mode: str | None = None) -> list[str]:
    """Compiles what the layers of a model compute beside their caches, in place, each block on its own.

    For models that transformers cannot decode with a static cache (DeepSeek-V4). Blocks are the children of a layer
    that have children themselves and take no cache: its mixture of experts or MLP, hyper-connections. Those with packed
    weights are compiled by this backend, the others by Inductor; layers of one class share their graphs, prefill and
    decode too.

    Args:
        model: of transformers.
        mode: of torch.compile, for blocks with packed weights. ``"reduce-overhead"`` records a CUDA graph of each for
            each number of tokens, also for each length of a prompt that comes twice. Not for the others: what a
            hyper-connection gives is needed after the next block has run.

    Returns:
        The paths of the blocks.
    """
    found = dict(_blocks(model))
    for block in found.values():
        packed = any(isinstance(module, PackedLinear | PackedExperts) for module in block.modules())
        block.compile(backend=BACKEND if packed else "inductor", dynamic=True, mode=mode if packed else None)
    return list(found)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, layer in model.named_modules():
        if isinstance(layer, GradientCheckpointingLayer):  # which every decoder layer is
            for name, block in layer.named_children():
                if any(block.children()) and not _CACHES & set(inspect.signature(block.forward).parameters):
                    yield f"{path}.{name}", block
