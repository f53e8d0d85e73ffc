"""Never another mixture's result: compiled experts run with the weights of the call, whatever happened to them."""

from unittest.mock import patch

import pytest
import torch
import transformers.integrations.moe  # noqa: F401, it defines grouped_mm_fallback
from torch import Tensor, nn

from marlin_w4a16.passes.live import binding
from marlin_w4a16.passes.mixture.stacks import pack_stack
from mixtures.written import Mixture, Parts, batched, grouped, inputs, interleaved

pytestmark = pytest.mark.usefixtures("without_inductor")

PARTS = {
    "grouped": Parts(grouped, interleaved, bias=True),
    "batched": Parts(batched),
    "pieces": Parts(grouped, total=lambda y: y.amax(1)),
}


@pytest.fixture(params=PARTS.values(), ids=PARTS)
def parts(request) -> Parts:
    """What the experts of a test are made of."""
    return request.param


def compiled(function):
    return torch.compile(function, backend="marlin_w4a16", fullgraph=True)


def assert_right(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_two_instances_through_one_function(parts):
    run, args = compiled(lambda module, *args: module(*args)), inputs()
    a, b = Mixture(parts), Mixture(parts)
    for module in (a, b, a, b, b):
        assert_right(run(module, *args), module(*args))


def test_layers_compiled_one_by_one(parts, said):
    layers, args = [Mixture(parts) for _ in range(3)], inputs()
    expected = [layer(*args) for layer in layers]
    for layer in layers:
        layer.compile(backend="marlin_w4a16", fullgraph=True)
    for _ in range(2):
        for layer, value in zip(layers, expected, strict=True):
            assert_right(layer(*args), value)
    assert len(said()) == 1


def copy_in_place(module: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(module.buffers(), other.buffers(), strict=True):
        mine.copy_(theirs)


def set_data(module: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(module.buffers(), other.buffers(), strict=True):
        mine.data = theirs.clone()


CHANGES = {
    "load_state_dict": lambda module, other: module.load_state_dict(other.state_dict()),
    "copy_in_place": copy_in_place,
    "set_data": set_data,
    "set_one_weight": lambda module, other: setattr(module, "gate_up_proj_codes", other.gate_up_proj_codes),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_change_are_followed(parts, change):
    module, other, args = Mixture(parts), Mixture(parts), inputs()
    run = compiled(module)
    assert_right(run(*args), module(*args))
    change(module, other)
    assert_right(run(*args), module(*args))


def test_changed_weights_are_packed_at_the_same_addresses(parts):
    module, other, args = Mixture(parts), Mixture(parts), inputs()
    packed: list[int] = []

    def watched(weight, batch, order, copy):
        packed.append(copy.words.data_ptr())
        return pack_stack(weight, batch, order, copy)

    run = compiled(module)
    run(*args)
    held = {copy.packed.words.data_ptr() for copy in binding._COPIES.values()}
    with patch.object(binding, "pack_stack", watched):
        module.load_state_dict(other.state_dict())
        assert_right(run(*args), module(*args))
    assert set(packed) <= held and len(packed) == 2


def test_experts_that_are_no_longer_fp4_run_as_traced(parts, caplog):
    module, args = Mixture(parts), inputs()
    run = compiled(module)
    run(*args)
    module.table[3] = 1.25
    assert_right(run(*args), module(*args))
    assert "is no longer FP4 as compiled" in caplog.text


def test_biases_are_those_of_the_call():
    module, args = Mixture(PARTS["grouped"]), inputs()
    run = compiled(module)
    run(*args)
    module.bias13 = nn.Parameter(torch.randn_like(module.bias13), requires_grad=False)
    module.bias2.data.zero_()
    assert_right(run(*args), module(*args))


def test_one_mixture_used_twice_in_a_graph(parts):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixture = Mixture(parts)

        def forward(self, x, weights, ids):
            y = self.mixture(x, weights, ids)
            return self.mixture(y / y.norm(dim=1, keepdim=True), weights.flip(0), ids.flip(1))

    module, args = Twice(), inputs()
    assert_right(compiled(module)(*args), module(*args))


def test_copies_die_with_the_weights():
    run, args = compiled(lambda module, *args: module(*args)), inputs()
    kept, gone = Mixture(PARTS["grouped"]), Mixture(PARTS["grouped"])
    before = len(binding._COPIES)
    for module in (kept, gone):
        run(module, *args)
    assert len(binding._COPIES) == before + 4
    del gone, module
    assert len(binding._COPIES) == before + 2
    assert_right(run(kept, *args), kept(*args))
