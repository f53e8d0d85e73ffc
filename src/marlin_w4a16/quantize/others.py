"""Modules that own matrices of which quantize() knows no packed form: each has a row, too."""

import re
from typing import Any

from torch import nn

from marlin_w4a16.quantize.readers import Readers

# What is looked up, added or convolved, or is a norm: by class, or by the words of a name.
_CLASSES = (
    nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
_CLASS_WORDS = re.compile(r"Embedding|Position|Conv|Norm|ParametrizationList")
_NAME_WORDS = re.compile(
    r"(^|_)(pos|position|positional|rel|scale|shift|stats?|mask)(_|s?$)|embed|token|bias|norm|latent"
)


def names_of(module: nn.Module, path: str) -> tuple[str, ...]:
    """The names of the matrices that a module owns; a vector with axes of one element is none."""
    if isinstance(module, _CLASSES) or _CLASS_WORDS.search(type(module).__name__):
        return ()
    last = path.rpartition(".")[2] if isinstance(module, nn.ParameterList | nn.ParameterDict) else ""
    return tuple(
        name
        for name, parameter in module._parameters.items()
        if parameter is not None
        and parameter.is_floating_point()
        and sum(size > 1 for size in parameter.shape) > 1
        and not _NAME_WORDS.search(last or name)
    )


def refusal(module: Any, readers: Readers, group: int, named: bool) -> str:
    """See linear.py."""
    names = [name for name, p in module._parameters.items() if p is not None and p.ndim > 1]
    return f"a {type(module).__name__} computes with its {', '.join(names)} by itself: no packed module does that"
