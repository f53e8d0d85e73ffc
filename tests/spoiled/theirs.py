"""What transformers refuses in its own words: what is spoiled then is none of this project's.

Each row is a type, what the message must be, and the spoilers of which one must have been at work.
"""

from __future__ import annotations

import re

from spoiled.case import Case

_TEXT, _METHOD = ("config: of text",), ("config: method", "config: algorithms", "config: wrong type", "config: unicode")
ALLOWED: tuple[tuple[type[Exception], str, tuple[str, ...]], ...] = (
    # config.json is no JSON, or has lost its model_type: transformers reads it first, and names it
    (OSError, r"It looks like the config file at '.*config\.json' is not a valid JSON file", _TEXT),
    (ValueError, r"Unrecognized model in .* Should have a `model_type` key in its config\.json", _TEXT),
    # there are no files of weights at all: transformers looks for them first, and names the folder
    (OSError, r"no file named model\.safetensors, or pytorch_model\.bin, found in directory", ("index: gone",)),
)


def is_theirs(case: Case, error: Exception) -> bool:
    """Whether an error is one of those."""
    rows = (row for row in ALLOWED if set(row[2]) & set(case.spoilers))
    return any(isinstance(error, kind) and re.search(pattern, str(error)) for kind, pattern, _ in rows)
