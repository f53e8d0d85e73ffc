"""What transformers refuses by itself, in its own words: what is spoiled then is none of this project's."""

from __future__ import annotations

from spoiled.case import Case


def is_theirs(case: Case, error: Exception) -> bool:
    """Whether an error is one of those."""
    return False
