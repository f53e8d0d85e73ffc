"""Which GPU the kernels serve, and as what: no GPU is needed to ask."""

import pytest
import torch

from marlin_w4a16.kernels.launch import plan_linear
from marlin_w4a16.kernels.target import Target, gluon_is_known, supports

OLD, AMPERE, NEW = [(7, 5)], [(8, 0), (8, 6), (8, 9)], [(10, 0), (12, 0)]


@pytest.mark.parametrize("capability", [*AMPERE, (9, 0)], ids=str)
def test_a_capability_from_8_to_below_10_is_served(capability, monkeypatch):
    target = Target(capability, 132)
    assert target.supported and target.why_not is None
    assert target.hopper == (capability == (9, 0)) and target.gluon == (target.hopper and gluon_is_known())
    monkeypatch.setattr(Target, "of", lambda device: target)
    assert supports(torch.device("cuda", 1))


@pytest.mark.parametrize("capability", [*OLD, *NEW], ids=str)
def test_another_is_not_and_is_no_hopper(capability, monkeypatch):
    target = Target(capability, 132)
    assert not target.supported and not target.hopper and not target.gluon
    why = "it has FP4 tensor cores of its own" if capability in NEW else "the kernels need 8.0"
    assert target.why_not == "device of capability {}.{}: {}".format(*capability, why)
    monkeypatch.setattr(Target, "of", lambda device: target)
    assert not supports(torch.device("cuda"))


@pytest.mark.parametrize("capability", NEW, ids=str)
@pytest.mark.parametrize("m", [1, 32, 64, 256])
def test_what_is_no_hopper_gets_no_launch_of_hoppers(capability, m):
    shape = m, 28672, 8192
    assert plan_linear(Target(capability, 132), *shape) == plan_linear(Target((8, 0), 132), *shape)
    assert (plan_linear(Target((9, 0), 132), *shape) == plan_linear(Target((8, 0), 132), *shape)) == (m == 1)


@pytest.mark.parametrize("device", ["cpu", "meta", "xpu"])
def test_other_devices_have_no_such_kernels(device):
    assert not supports(torch.device(device))


def test_a_target_is_what_torch_says_of_the_device(monkeypatch):
    class Properties:
        major, minor, multi_processor_count = 8, 9, 142

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert Target.of(torch.device("cuda", 1)) == Target((8, 9), 142)
