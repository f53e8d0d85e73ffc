"""What transformers refuses in its own words: what is spoiled then is none of this project's.

Each row is a type, what the message must be, and the spoilers of which one must have been at work.
"""

from __future__ import annotations

import re
from json import JSONDecodeError

from safetensors import SafetensorError

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.registry import scheme_of
from spoiled.case import Case

_TEXT, _GONE = ("config: of text",), ("config: elsewhere",)
ALLOWED: tuple[tuple[type[Exception], str, tuple[str, ...]], ...] = (
    # config.json is no JSON, or has lost its model_type: transformers reads it first, and names it
    (OSError, r"It looks like the config file at '.*config\.json' is not a valid JSON file", _TEXT),
    (ValueError, r"Unrecognized model in .* Should have a `model_type` key in its config\.json", _TEXT),
    # there are no files of weights at all: transformers looks for them first, and names the folder
    (OSError, r"no file named model\.safetensors, or pytorch_model\.bin, found in directory", ("index: gone",)),
    # no config says that anything is quantised, so that all is left to transformers, and it finds what is wrong itself
    (SafetensorError, "deserializing header", _GONE),
    (FileNotFoundError, r"^No such file or directory: .*\.safetensors$", _GONE),
    (RuntimeError, "You set `ignore_mismatched_sizes` to `False`", _GONE),
    # a text_config in the config of a class that has none: transformers itself expects no dict there
    (AttributeError, "^'dict' object has no attribute 'to_dict'$", _GONE),
    # a method of transformers' own, whose config lacks what that method needs
    (TypeError, r"^GPTQConfig\.__init__\(\) missing", ("config: method",)),
)
LEFT = (ImportError, ValueError, NotImplementedError, SafetensorError, RuntimeError)
_CONVERSION = "issues during automatic conversion of the weights"


def is_theirs(case: Case, error: Exception) -> bool:
    """Whether an error is one of those."""
    rows = (row for row in ALLOWED if set(row[2]) & set(case.spoilers))
    if any(isinstance(error, kind) and re.search(pattern, str(error)) for kind, pattern, _ in rows):
        return True
    if type(error) is RuntimeError and not re.search(_CONVERSION, str(error)):
        return False
    return is_left(case) and isinstance(error, LEFT) and not isinstance(error, JSONDecodeError)


def is_left(case: Case) -> bool:
    """Whether a spoiled config says that nothing is FP4, in words that are well, or that it is of somebody else.

    Then it is left to transformers' own quantizer of that method, which needs packages, and has rules of its own.
    """
    _, config = case.parts.quantization
    if not any(name.startswith("config") for name in case.spoilers) or not isinstance(config, dict):
        return False
    try:
        scheme = scheme_of({"quant_method": "modelopt", **config}, case.parts.config)
    except CheckpointError:
        return False
    return scheme is None
