"""The config of a model whose GGUF file has FP4: what transformers makes of the metadata, and what it leaves out.

Read in transformers 5.23 and 5.24.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.hub import cached_file

from marlin_w4a16.checkpoints import gguf
from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.gguf_header import Header, header

# None before 5.23: transformers decoded all tensors to a state dict, and asked no quantizer.
QUANTIZER = "transformers.quantizers.quantizer_gguf"
_HEAD = {"attention.key_length": "head_dim"}
# What transformers leaves out of the metadata, by model_type: where it stands in a config.
_ALSO: Mapping[str, Mapping[str, str]] = {
    "llama": _HEAD,
    "mistral": _HEAD,
    "qwen3": _HEAD,
    "gpt_oss": {**_HEAD, "expert_feed_forward_length": "intermediate_size"},
    "qwen3_moe": {**_HEAD, "expert_feed_forward_length": "moe_intermediate_size"},
    "qwen2_moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
}


def read(file: Path, theirs: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What transformers reads of a file's config, completed where the file has FP4.

    Args:
        file: of GGUF.
        theirs: reads the config of it.

    Raises:
        CheckpointError: it is damaged, or has FP4 and transformers reads nothing of its architecture, or is too old.
    """
    if find_spec("gguf") is None:
        return theirs()
    found = header(file)
    if not gguf.fp4(found):
        return theirs()
    if find_spec(QUANTIZER) is None:
        raise CheckpointError(
            f"{file}: found FP4 with transformers {transformers.__version__}, expected 5.23 or later: it dequantises "
            "all of GGUF before"
        )
    if (files := found.metadata.get("split.count", 1)) > 1:
        raise CheckpointError(f"{file}: found one of {files} files, expected all in one: llama-gguf-split --merge")
    try:
        config, rest = theirs()
    except ValueError as error:
        raise CheckpointError(
            f"{file}: general.architecture: found {found.architecture!r}, expected one that transformers reads: {error}"
        ) from error
    _complete(config, found)
    return config, rest


def located(path: str, name: str, **of_the_hub: Any) -> Path | None:
    """Where a GGUF file lies, in a folder or from the hub; None: transformers will say so."""
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **of_the_hub)
    return None if found is None else Path(found)


def _complete(config: dict[str, Any], found: Header) -> None:
    for key, name in _ALSO.get(str(config.get("model_type")), {}).items():
        if (value := found.own(key)) is not None:
            config[name] = value
    if config.get("model_type") == "gpt_oss":
        config["rope_scaling"] = _yarn(found) or {"rope_type": "default"}


def _yarn(found: Header) -> dict[str, Any] | None:
    """The scaling of rotary embeddings; of these metadata transformers reads the lengths of the keys."""
    if found.own("rope.scaling.type") != "yarn":
        return None
    said = {
        "factor": found.own("rope.scaling.factor"),
        "original_max_position_embeddings": found.own("rope.scaling.original_context_length"),
        "beta_fast": found.own("rope.scaling.yarn_beta_fast") or 32.0,
        "beta_slow": found.own("rope.scaling.yarn_beta_slow") or 1.0,
    }
    return {"rope_type": "yarn", "truncate": False, **{key: value for key, value in said.items() if value is not None}}
