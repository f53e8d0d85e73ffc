"""Stacks of linears for groups of rows: what they compute, hold, move and load."""

import copy
import pickle

import pytest
import torch
from torch import nn

from marlin_w4a16 import FP4Weight, quantize_mxfp4, quantize_nvfp4
from marlin_w4a16.modules.packed_groups import PackedGroups

SIZES = [3, 0, 5]


def stack(quantise=quantize_nvfp4) -> FP4Weight:
    parts = [quantise(torch.randn(96, 64)) for _ in SIZES]
    codes, scales, multiplier = (torch.stack([getattr(p, f) for p in parts]) for f in ("codes", "scales", "multiplier"))
    return FP4Weight(codes, scales, multiplier, parts[0].kind, parts[0].group, "stack")


@pytest.mark.parametrize("quantise", [quantize_nvfp4, quantize_mxfp4])
@pytest.mark.parametrize("sizes", [SIZES, torch.tensor(SIZES)], ids=["list", "tensor"])
def test_each_group_of_rows_meets_its_own_matrix(quantise, sizes):
    weight, x = stack(quantise), torch.randn(8, 64, requires_grad=True)
    module, exact = PackedGroups(weight, torch.float32), weight.decode(torch.float32)
    expected = torch.cat([nn.functional.linear(x[:3], exact[0]), nn.functional.linear(x[3:], exact[2])])
    found = module(x, sizes)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


def test_its_state_is_its_own():
    module, other, x = PackedGroups(stack()), PackedGroups(stack()), torch.randn(8, 64)
    assert not torch.equal(module(x, SIZES), other(x, SIZES))
    other.load_state_dict(module.state_dict())
    for one in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).half()):
        assert torch.equal(one(x, SIZES), module(x, SIZES))
    smaller = PackedGroups(stack().derived(*(t[:2] for t in (stack().codes, stack().scales, stack().multiplier))))
    with pytest.raises(RuntimeError, match="found a weight packed as"):
        smaller.load_state_dict(module.state_dict())


def test_a_matrix_is_no_stack():
    with pytest.raises(ValueError, match="found a weight of 2 dimensions, expected 3"):
        PackedGroups(quantize_nvfp4(torch.randn(96, 64)))


def test_it_tells_what_it_is():
    expected = "experts=3, in_features=64, out_features=96, NVFP4 group 16, "
    assert PackedGroups(stack()).extra_repr().startswith(expected)
