"""The quantisation of a linear's input (W4A4), written in plain torch: kept, left out or a reason to refuse."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from marlin_w4a16 import E2M1_VALUES, explain
from programs.backend import through_backend

K = 64
GRID = torch.tensor(E2M1_VALUES[:8])


def to_fp4(x: Tensor, group: int = 16) -> Tensor:
    """NVFP4 without a global scale."""
    blocks = x.reshape(*x.shape[:-1], -1, group)
    scales = (blocks.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).to(x.dtype).clamp(min=2.0**-9)
    nearest = (blocks.abs() / scales).unsqueeze(-1).sub(GRID.to(x.dtype)).abs().argmin(-1)
    return (GRID.to(x.dtype)[nearest] * blocks.sign() * scales).reshape(x.shape)


class Quantising(nn.Module):
    def __init__(self, layer: nn.Module, quantiser, inside=None):
        super().__init__()
        self.layer, self.quantiser, self.run = layer, quantiser, inside or (lambda f, x: f(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(lambda t: linear(self.quantiser(t), self.layer.weight()), x.sin())


def in_checkpoint(function, x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


QUANTISERS = {
    "groups of 16": to_fp4,
    "groups of 32": lambda x: to_fp4(x, 32),
    "cast back": lambda x: to_fp4(x.float()).to(x.dtype),
}
OTHERS = {
    "nothing": lambda x: x, "relu": torch.relu, "FP8": lambda x: x.to(torch.float8_e4m3fn).to(x.dtype),
    "integers": lambda x: (x * 7).round() / 7, "a norm before": lambda x: nn.functional.rms_norm(x, (K,)),
    "of another input": lambda x: to_fp4(x.flip(-1)),
}  # fmt: skip


@pytest.mark.parametrize("inside", [None, in_checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("quantiser", QUANTISERS.values(), ids=QUANTISERS)
def test_it_is_kept_dropped_or_refused(fp4_linear, assert_near, quantiser, inside):
    model, x = Quantising(fp4_linear(), quantiser, inside), torch.randn(3, K)
    eager, bare = model(x), linear(x.sin(), model.layer.weight())
    assert (eager - bare).norm() > 0.01 * bare.norm()
    for choice, expected in (("keep", eager), ("drop", bare), ("refuse", eager)):
        out, line = through_backend(model, (x,), activation_quant=choice)
        assert_near(out, expected)
        assert ("replaced 1 of 1" in line) == (choice != "refuse"), line
    (row,) = explain(model, x, options={"activation_quant": "drop"}).replaced
    assert row.outcome.note == "the quantisation of its input is left out"
    (row,) = explain(model, x, options={"activation_quant": "refuse"}).rejected
    assert row.outcome.reason.startswith("its input is quantised too (W4A4)")


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_is_no_quantiser_of_fp4_stays(fp4_linear, assert_near, other):
    model, x = Quantising(fp4_linear(), other), torch.randn(3, K)
    for choice in ("drop", "refuse"):
        out, line = through_backend(model, (x,), activation_quant=choice)
        if other is OTHERS["of another input"]:
            continue  # flipped first: what was quantised is the flipped input
        assert_near(out, model(x))
        assert "replaced 1 of 1" in line, line


def test_what_was_quantised_is_found_behind_what_comes_before_it(fp4_linear, assert_near):
    model, x = Quantising(fp4_linear(), OTHERS["of another input"]), torch.randn(3, K)
    out, _ = through_backend(model, (x,), activation_quant="drop")
    assert_near(out, linear(x.sin().flip(-1), model.layer.weight()))


@pytest.mark.parametrize("inside", [None, in_checkpoint], ids=["plain", "checkpoint"])
def test_it_is_dropped_and_verified(fp4_linear, inside):
    model = Quantising(fp4_linear(), to_fp4, inside)
    _, line = through_backend(model, (torch.randn(3, K),), activation_quant="drop", verify=True)
    assert "worst error of verify" in line, line


@pytest.mark.parametrize("choice", ["drop", "refuse"])
def test_what_is_quantised_in_a_region_that_ends_before_the_product_stays(fp4_linear, assert_near, choice):
    layer = fp4_linear()

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(checkpoint(lambda t: to_fp4(t.sin()), x, use_reentrant=False), layer.weight())

    model, x = Model(), torch.randn(3, K)
    out, line = through_backend(model, (x,), activation_quant=choice)
    assert_near(out, model(x))
    assert "replaced 1 of 1" in line, line


def test_what_casts_too_stays(fp4_linear, assert_near):
    """The product is computed in the dtype of what was quantised, not of what it was made from."""
    layer, x = fp4_linear(dtype=torch.bfloat16), torch.randn(3, K)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(to_fp4(x.sin()).bfloat16(), layer.weight())

    out, _ = through_backend(Model(), (x,), activation_quant="drop")
    assert out.dtype == torch.bfloat16
    assert_near(out, Model()(x))
