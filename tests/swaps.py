"""A model of two linears, and what prepare(), restore() and quantize() say of those of any."""

from torch import Tensor, nn

from marlin_w4a16.modules.swaps import Swaps


def refusals(swaps: Swaps) -> dict[str, str]:
    """Why modules were left, by their paths."""
    return {row.path: row.refusal for row in swaps.refused}


def done(swaps: Swaps) -> list[str]:
    """The paths of those that were swapped."""
    return [row.path for row in swaps.done]


class MLP(nn.Module):
    """64 to 96 with a bias, and back without."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())
