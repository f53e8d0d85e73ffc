"""What the report says of a mixture, which gives what it gave."""

from torch import Tensor, nn

from marlin_w4a16.passes.outcome import Replaced
from mixtures.written import inputs
from programs.backend import reported


def note(module: nn.Module, args: tuple[Tensor, ...] | None = None) -> str | None:
    """Why a module is no whole mixture, or None where it is one; it computes what it did."""
    args = args or inputs()
    found, report = reported(module, args)
    expected = module(*args)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    (row, _) = report.rows
    assert isinstance(row.outcome, Replaced)
    assert (row.outcome.op == "marlin_w4a16::moe") == (row.outcome.note is None)
    return row.outcome.note
