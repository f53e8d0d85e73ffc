"""What prepare(), restore() and quantize() say of the modules of a model."""

from marlin_w4a16.modules.swaps import Swaps


def refusals(swaps: Swaps) -> dict[str, str]:
    """Why modules were left, by their paths."""
    return {row.path: row.refusal for row in swaps.refused}


def done(swaps: Swaps) -> list[str]:
    """The paths of those that were swapped."""
    return [row.path for row in swaps.done]
