"""A packed head has no rows to add: a model with one refuses ``resize_token_embeddings`` before anything is resized."""

from functools import partial
from typing import Any

from transformers import PreTrainedModel

from marlin_w4a16.modules.state import PackedState

_METHOD = "resize_token_embeddings"


def refuse_resizing(model: PreTrainedModel) -> None:
    """Has a model with a packed head raise where it would resize its embedding, and then fail at the head."""
    if isinstance(model.get_output_embeddings(), PackedState):
        vars(model)[_METHOD] = partial(_refused, model)


def allow_resizing(model: PreTrainedModel) -> None:
    """Undoes it."""
    vars(model).pop(_METHOD, None)


def _refused(model: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    if new_num_tokens is None and not args and not any(value is not None for value in options.values()):
        return model.get_input_embeddings()
    raise ValueError(
        f"{type(model).__name__}: found a packed head, expected a dense one to resize with the embedding: make the "
        "model dense first, by model.dequantize()"
    )
