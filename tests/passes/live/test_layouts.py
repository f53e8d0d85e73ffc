"""Never another weight's result: where tensors stay what they are and are laid out in another way."""

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import refresh

pytestmark = pytest.mark.usefixtures("without_inductor")

N, K = 64, 128  # as many rows of codes as columns
X = torch.linspace(-1, 1, 3 * K).view(3, K)


def fewer_rows(module, rows: slice) -> None:
    for tensor in (module.codes, module.scales):
        tensor.data = tensor.data[rows]


def resized(module) -> None:
    for tensor in (module.codes, module.scales):
        tensor.resize_(N - 16, tensor.shape[1])


def turned(tensor: Tensor) -> Tensor:
    """The same shape and memory, read in another order."""
    return tensor.as_strided(tensor.shape, (1, tensor.shape[0]))


CHANGES = {
    "data is a transpose": lambda m: setattr(m.codes, "data", m.codes.data.t()),
    "data is strided": lambda m: setattr(m.codes, "data", turned(m.codes.data)),
    "data of the scales is strided": lambda m: setattr(m.scales, "data", turned(m.scales.data)),
    "data is of another dtype": lambda m: setattr(m.scales, "data", m.scales.data.view(torch.int8)),
    "data is of a dtype with other values": lambda m: setattr(m.factor, "data", m.factor.data.view(torch.int32)),
    "the first rows": lambda m: fewer_rows(m, slice(N - 16)),
    "the last rows": lambda m: fewer_rows(m, slice(16, N)),
    "resize_": resized,
    "t_": lambda m: m.codes.t_(),
    "transpose_": lambda m: m.codes.transpose_(0, 1),
    "as_strided_": lambda m: m.codes.as_strided_(m.codes.shape, (1, N)),
    "set_": lambda m: m.codes.set_(m.codes.data.t()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_layout_that_changes_and_comes_back(fp4_linear, assert_near, change, dynamic):
    module = fp4_linear(N, K)
    run = torch.compile(module, backend="marlin_w4a16", fullgraph=True, dynamic=dynamic)
    assert_near(run(X), module(X))
    before = [(tensor, tensor.data) for tensor in (module.codes, module.scales, module.factor)]
    for _ in range(2):
        change(module)
        assert_near(run(X), module(X))
        assert_near(run(X), module(X))
        for tensor, data in before:
            tensor.data = data
        assert_near(run(X), module(X))


@torch.no_grad()
def test_a_layout_that_changes_is_seen_with_refresh_too(fp4_linear, assert_near):
    module = fp4_linear(N, K)
    run = torch.compile(module, backend="marlin_w4a16", fullgraph=True)
    for _ in range(3):
        assert_near(run(X), module(X))
        module.codes.data = module.codes.data.t()
        refresh(module)
    assert_near(run(X), module(X))


@torch.no_grad()
def test_data_that_comes_back_after_another_graph_has_packed_the_shared_copy(fp4_linear, assert_near):
    module = fp4_linear()
    run = torch.compile(module, backend="marlin_w4a16", fullgraph=True, dynamic=False)
    one, two = X[:1, :64], X[:2, :64]
    first, second = module.codes.data, module.codes.data.roll(1, 0)
    for x, data in ((one, first), (two, first), (two, second), (one, first), (two, second), (one, second)):
        module.codes.data = data
        assert_near(run(x), module(x))


def anew(module) -> tuple[int, int]:
    """A parameter of the same memory in the place of the codes; its address and version, which are those of before."""
    module.codes = nn.Parameter(module.codes.data, requires_grad=False)
    return module.codes.data_ptr(), module.codes._version


def test_a_new_parameter_over_the_same_memory_that_was_written_to(fp4_linear, assert_near):
    module = fp4_linear()
    state, run = anew(module), torch.compile(module, backend="marlin_w4a16", fullgraph=True)
    for writes in (1, 2, 3):
        assert_near(run(X[:, :64]), module(X[:, :64]))
        for i in range(writes):
            module.codes.bitwise_xor_(1 << i)
            assert anew(module) == state
    assert_near(run(X[:, :64]), module(X[:, :64]))
