"""The kernels of the gradient of a linear's input without a GPU, in float16, as in test_interpreter.py."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from marlin_w4a16.kernels.fp4 import FP4Weight
from marlin_w4a16.kernels.grad_launch import GradLaunch
from marlin_w4a16.kernels.layout import pack
from narrow import matrix

FORMATS = list(product(["e4m3", "e8m0"], [16, 32]))


def contiguous(m: int, n: int) -> Tensor:
    return torch.randn(m, n).half()


def transposed(m: int, n: int) -> Tensor:
    return torch.randn(n, m).half().t()


def sliced(m: int, n: int) -> Tensor:
    return torch.randn(2 * m, 3 * n).half()[::2, n : 2 * n]


def repeated(m: int, n: int) -> Tensor:
    return torch.randn(1, n).half().expand(m, n)


def equal(n: int) -> Tensor:
    return torch.full((n,), -3.1e-3)


def merged(n: int) -> Tensor:
    """Parts with a global scale each, as those of joined projections."""
    return torch.tensor([1e-3, 2.14e-3, 3.3e-3]).repeat_interleave(-(-n // 3))[:n].clone()


def any_sign(n: int) -> Tensor:
    return torch.randn(n) * (torch.arange(n) % 5 != 0)


def zeros(n: int) -> Tensor:
    return torch.zeros(n)


def assert_near(out: Tensor, grad: Tensor, weight: FP4Weight) -> None:
    """Within the rounding of each output, that of the scaled gradients and that of the sums to float32."""
    exact = grad.double() @ weight.decode()
    magnitude = grad.double().abs() @ weight.decode().abs()
    same = bool((weight.multiplier.abs() == weight.multiplier.abs().max()).all())
    lost = (1e-6 if same else 2.0**-11 + 1e-6) * magnitude
    smallest = 2.0**-25  # half of float16's
    assert out.dtype == grad.dtype and out.shape == exact.shape
    assert (out.double() - exact).abs().le(2.0**-11 * exact.abs() + lost + smallest).all()
    if out.numel() >= 3000:
        assert (out.double() - exact).norm() <= (2.3e-4 if same else 4.6e-4) * exact.norm()


GRADIENTS = [
    # m, n, k, grad, multiplier, launch
    (1, 70, 160, contiguous, equal, GradLaunch(16, 64, 64, 1, 4, 3)),
    (1, 70, 160, transposed, any_sign, GradLaunch(16, 64, 128, 4, 4, 3)),
    (5, 1, 32, sliced, any_sign, GradLaunch(16, 128, 64, 1, 4, 3)),
    (5, 672, 224, contiguous, merged, GradLaunch(16, 128, 128, 4, 4, 3)),
    (17, 70, 160, repeated, merged, GradLaunch(16, 64, 128, 1, 4, 3)),
    (17, 672, 224, transposed, equal, GradLaunch(32, 64, 128, 4, 4, 3)),
    (17, 642, 224, sliced, any_sign, GradLaunch(16, 128, 64, 1, 4, 3)),
    (33, 64, 32, contiguous, zeros, GradLaunch(16, 64, 64, 4, 4, 3)),
]
ROUNDED = matrix(lambda i, j: (i + i // 2 + j + j // 2) % 2 == 0, FORMATS, dict(enumerate(GRADIENTS)))


@pytest.mark.parametrize("form, gradient", ROUNDED)
def test_the_fused_gradient_is_that_of_the_exact_weight(form, gradient, interpret, random_weight):
    m, n, k, make, multiplier, launch = gradient
    weight = replace(random_weight(n, k, *form), multiplier=multiplier(n))
    grad = make(m, n) / 64
    (out,) = interpret(("fused_grad_input", (grad, pack(weight), launch)))
    assert_near(out, grad, weight)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("blocks", [(1 << 20, 1 << 20), (3 * 1 << 14, 500), (1, 1)], ids=str)
def test_the_gradient_through_the_dense_weight_is_no_other(form, blocks, interpret, random_weight):
    weight = replace(random_weight(150, 224, *form), multiplier=merged(150))
    grad = transposed(9, 150) / 64
    (out,) = interpret(("grad_input_through_dense", (grad, pack(weight), *blocks)))
    assert_near(out, grad, weight)


@pytest.mark.parametrize("programs", [1, 2, 64])
def test_gradients_of_rows_with_one_multiplier_are_scaled_by_a_power_of_two(programs, interpret, random_weight):
    weight = replace(random_weight(70, 32), multiplier=equal(70))
    grad = sliced(5, 70) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 0.0])[:, None].half()
    ((scaled, factors),) = interpret(("scaled_gradient", (grad, pack(weight), programs)))
    powers = -factors / weight.multiplier[0]
    assert torch.equal(torch.frexp(powers).mantissa, torch.full((5,), 0.5)) and powers[4] == 1
    assert torch.equal(-scaled[:, :70].double() * powers[:, None].double(), grad.double())
    assert scaled.shape == (5, 128) and not scaled[:, 70:].any()
    assert scaled[:4].abs().amax(1).ge(2.0**14).all() and scaled.isfinite().all()


EXTREMES = {
    "huge": torch.tensor([1e38, -3e38, 2e38]),
    "tiny": torch.tensor([1e-38, 3e-38, -1e-44]),
    "far apart": torch.tensor([1e30, 1.0, 1e-30]),
    "one that is not zero": torch.tensor([0.0, 0.0, -2e-5]),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_multipliers_at_the_ends_of_float32_are_taken_apart(name, interpret, random_weight):
    multiplier = EXTREMES[name].repeat(25)
    packed = pack(replace(random_weight(75, 32), multiplier=multiplier))
    grad = contiguous(4, 75) * torch.tensor([1e-5, 1.0, 1e3, 1.0])[:, None].half()
    grad[3, multiplier.abs() > 1] = 0  # what is left is far below the largest
    ((scaled, factors),) = interpret(("scaled_gradient", (grad, packed, 8)))
    assert scaled.isfinite().all() and factors.isfinite().all()
    exact = grad.double() * multiplier.double()
    error = (scaled[:, :75].double() * factors[:, None].double() - exact).abs()
    smallest = 2.0**-24 * factors.double() + 2.0**-134  # factors may be subnormal
    assert error.le(2.0**-10 * exact.abs() + smallest[:, None]).all()


def test_what_is_no_number_stays_in_its_token(interpret, random_weight):
    weight = random_weight(70, 96)
    grad = contiguous(6, 70)
    grad[1, 3], grad[2, 69], grad[4, 0] = torch.nan, torch.inf, -torch.inf
    whole = torch.randn(6, 140).half()
    whole[:, 70:] = torch.nan  # behind the columns
    whole[:, :70] = grad
    launch = GradLaunch(16, 64, 128, 1, 4, 3)
    out, dense = interpret(
        ("fused_grad_input", (whole[:, :70], pack(weight), launch)),
        ("grad_input_through_dense", (whole[:, :70], pack(weight), 1 << 20, 1 << 20)),
    )
    for found in (out, dense):
        assert found[[0, 3, 5]].isfinite().all() and not found[[1, 2, 4]].isfinite().any()


def test_a_slice_of_a_packed_weight(interpret, random_weight):
    packed = pack(random_weight(256, 320))
    tiles = (slice(1, 3), slice(1, 4))
    part = replace(
        packed,
        words=packed.words[tiles],
        scales=packed.scales[tiles],
        multiplier=packed.multiplier[64:192],
        n=128,
        k=192,
    )
    grad = contiguous(3, 128)
    (out,) = interpret(("fused_grad_input", (grad, part, GradLaunch(16, 128, 64, 1, 4, 3))))
    assert_near(out, grad, part.unpack())


def test_columns_of_tiles_are_written_out_exactly(interpret, random_weight):
    weight = random_weight(130, 320)
    whole, some = interpret(("decode", (pack(weight),)), ("decode", (pack(weight), slice(1, 4))))
    assert torch.equal(some[:, :192].view(torch.int16), whole[:, 64:256].view(torch.int16))
    assert some[:, 192:].isnan().all()
