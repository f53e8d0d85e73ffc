"""Cases of matrices of which a part runs without --wide."""

from typing import Any

import pytest


def case(*values: Any, id: str, narrow: bool) -> Any:
    """One case, which is marked wide unless it is of the narrow part."""
    return pytest.param(*values, id=id, marks=() if narrow else pytest.mark.wide)
