"""What the ops return may be written in place where gradients are on, as what `nn.Linear` returns may."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16.fake_impls.dequantize import dequantize
from marlin_w4a16.fake_impls.grouped_linear import grouped_linear
from marlin_w4a16.fake_impls.library import weight_args
from marlin_w4a16.fake_impls.linear import linear
from marlin_w4a16.fake_impls.moe import activation_args, moe
from marlin_w4a16.kernels.layout import pack
from marlin_w4a16.kernels.quantize import quantize_nvfp4
from mixtures.oracle import draw_mixture, draw_routing, draw_stack

OPS = torch.ops.marlin_w4a16
N, K, EXPERTS, TOKENS = 40, 96, 4, 6
WEIGHT, STACK = pack(quantize_nvfp4(torch.randn(N, K))), pack(draw_stack(EXPERTS, N, K))
ENDS = torch.tensor([1, 1, 4, 6])
MIXTURE = draw_mixture(biases=True)
EXPERT_WEIGHTS = MIXTURE.packed()
HIDDEN = EXPERT_WEIGHTS.w2.n
ROUTING = draw_routing(TOKENS, 2, EXPERTS)
MOE = (
    *weight_args(EXPERT_WEIGHTS.w13), *weight_args(EXPERT_WEIGHTS.w2), EXPERT_WEIGHTS.bias13, EXPERT_WEIGHTS.bias2,
    *activation_args(EXPERT_WEIGHTS.activation), False, None,
)  # fmt: skip


def mixture(x: Tensor) -> Tensor:
    e = EXPERT_WEIGHTS
    return moe(x, e.w13, e.w2, *ROUTING, activation=e.activation, bias13=e.bias13, bias2=e.bias2)


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda x: linear(x, WEIGHT, torch.ones(N)), (TOKENS, K)),
    "linear of a batch": (lambda x: linear(x, WEIGHT), (2, 3, K)),
    "linear of a row": (lambda x: linear(x, WEIGHT), (K,)),
    "linear of nothing": (lambda x: linear(x, WEIGHT), (2, 0, K)),
    "linear_grad_input": (lambda x: OPS.linear_grad_input(x, *weight_args(WEIGHT)), (2, 3, N)),
    "grouped_linear": (lambda x: grouped_linear(x, STACK, ENDS), (TOKENS, K)),
    "grouped_linear_grad_input": (lambda x: OPS.grouped_linear_grad_input(x, *weight_args(STACK), ENDS), (TOKENS, N)),
    "moe": (mixture, (TOKENS, HIDDEN)),
}
WRITES: dict[str, Callable[[Tensor], object]] = {
    "add_": lambda y: y.add_(1),
    "relu_": lambda y: nn.functional.relu(y, inplace=True),
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 2.0),
    "through a view": lambda y: y[..., 1:].mul_(3),
}
EVERY_FUNCTION = pytest.mark.parametrize("function, shape", FUNCTIONS.values(), ids=FUNCTIONS)


@EVERY_FUNCTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_result_is_a_view(function, shape, dtype):
    for x in (torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype, requires_grad=True)):
        assert not function(x)._is_view()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_other_result_is_a_view(dtype):
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
    for result in (dequantize(WEIGHT, dtype), *OPS.moe_grad(torch.randn_like(x), x, *ROUTING, *MOE)):
        assert not result._is_view()


@EVERY_FUNCTION
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_result_is_written_in_place(function, shape, write, backend):
    def written(x: Tensor, result: Callable[[Tensor], Tensor] = lambda y: y) -> tuple[Tensor, Tensor]:
        y = result((torch.compile(function, backend=backend) if backend else function)(x))
        write(y)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    x = torch.randn(shape, requires_grad=True)
    for found, expected in zip(written(x), written(x, Tensor.clone), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_in_a_compiled_function_too(backend):
    def twice(x: Tensor) -> Tensor:
        y = linear(x, WEIGHT)
        y += 1
        return linear(y @ torch.ones(N, K), WEIGHT).relu_()

    x = torch.randn(2, 3, K, requires_grad=True)
    out = (torch.compile(twice, backend=backend, fullgraph=True) if backend else twice)(x)
    expected = linear((linear(x, WEIGHT) + 1) @ torch.ones(N, K), WEIGHT).relu()
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)]
    torch.testing.assert_close((out, grads[0]), (expected, grads[1]))


@EVERY_FUNCTION
def test_a_gradient_that_is_differentiated_again_is_written_in_place(function, shape):
    if function is mixture:
        pytest.skip("its gradient cannot be differentiated again")

    def penalty(copy: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        first = copy(first)
        first *= 2
        return torch.autograd.grad(first.square().sum(), x)[0]

    x = torch.randn(shape, requires_grad=True)
    assert torch.equal(penalty(lambda g: g), penalty(Tensor.clone))
