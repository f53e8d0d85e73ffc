import copy
import pickle
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16 import pack, quantize_nvfp4
from marlin_w4a16.fake_impls import eager
from marlin_w4a16.fake_impls.eager import nothing_entered


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("enter", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_on_or_off_are_plain(enter):
    with enter():
        assert nothing_entered()


@pytest.mark.parametrize(
    "enter",
    [
        Dispatch,
        Function,
        lambda: torch.autocast("cpu"),
        lambda: torch.device("meta"),
        forward_ad.dual_level,
        lambda: torch.autograd.profiler.profile(use_kineto=True),
        torch._subclasses.FakeTensorMode,
    ],
    ids=["dispatch mode", "function mode", "autocast", "device", "forward AD", "profiler", "fake tensors"],
)
def test_whatever_would_see_an_op_is_no_plain_state(enter):
    with enter():
        assert not nothing_entered()
    assert nothing_entered()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap, torch.func.functionalize])
def test_transforms_are_no_plain_state(transform):
    found = []

    def function(x):
        found.append(nothing_entered())
        return (x * x).sum()

    transform(function)(torch.ones(2, 3))
    assert found == [False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_is_no_plain_state():
    found = []
    torch.jit.trace(lambda x: (found.append(nothing_entered()), x + 1)[1], torch.ones(2), check_trace=False)
    assert found == [False]


def test_a_state_is_of_its_thread():
    found = []
    with Dispatch():
        thread = threading.Thread(target=lambda: found.append(nothing_entered()))
        thread.start()
        thread.join()
    assert found == [True]


@pytest.fixture
def packed(monkeypatch):
    """A weight whose tensors are taken for those of a CUDA device."""
    monkeypatch.setattr(eager, "_is_right", lambda packed: checked.append(packed) is None and right.value)
    checked, right = [], SimpleNamespace(value=True)
    return pack(quantize_nvfp4(torch.randn(64, 64))), checked, right


def test_a_weight_is_checked_once_where_it_stands(packed):
    weight, checked, _ = packed
    assert len({eager.proof_of(weight) for _ in range(3)}) == 1
    assert len(checked) == 1


@pytest.mark.parametrize("name", ["words", "scales", "multiplier"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(),
        lambda t: t[:0],
        lambda t: t.view(torch.uint8)[..., :4],
        lambda t: t.unsqueeze(-1).expand(*t.shape, 2),
    ],
    ids=["moved", "shorter", "another dtype", "expanded"],
)
def test_a_tensor_that_was_changed_is_checked_again(packed, name, change):
    weight, checked, right = packed
    eager.proof_of(weight)
    tensor = getattr(weight, name)
    tensor.data = change(tensor.data)
    right.value = False
    assert eager.proof_of(weight) is None
    assert len(checked) == 2


def test_a_storage_that_was_freed_is_checked_again(packed):
    weight, _, right = packed
    eager.proof_of(weight)
    weight.words.untyped_storage().resize_(0)
    right.value = False
    assert eager.proof_of(weight) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda weight: pickle.loads(pickle.dumps(weight))])
def test_copies_are_checked_for_themselves(packed, copied):
    weight, checked, _ = packed
    eager.proof_of(weight)
    other = copied(weight)
    eager.proof_of(other)
    assert checked == [weight, other]


def test_what_is_wrong_is_left_to_the_op():
    weight = pack(quantize_nvfp4(torch.randn(64, 64)))  # on the CPU
    assert eager.proof_of(weight) is None
    assert not weight.proofs


@pytest.mark.parametrize("m", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
def test_the_output_is_new_and_contiguous(m, monkeypatch):
    monkeypatch.setattr(eager, "empty", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype))
    x = torch.zeros(*m, 16, dtype=torch.bfloat16)
    out = eager.new_output(x, 5)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((*m, 5), x.dtype, True)


def test_biases_that_fit():
    row = torch.zeros(8)
    assert eager.fits(row, (8,), -1)
    assert eager.fits(torch.nn.Parameter(row), (8,), -1)
    for wrong in (row[:4], row.int(), torch.zeros(16)[::2], row.unsqueeze(0)):
        assert not eager.fits(wrong, (8,), -1)
    assert not eager.fits(row, (8,), 0)
