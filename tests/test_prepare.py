"""What prepare() and restore() do to any model; tests/producers has what is special to a producer."""

import copy
import gc
import importlib
import weakref

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import PackedLinear, prepare, quantize_nvfp4, restore
from marlin_w4a16.prepare import Swap
from marlin_w4a16.producers import torchao as producer
from marlin_w4a16.tensors import held_tensors
from swaps import refusals

DENSE = "its weight is dense torch.float32, of no producer of FP4"
X = torch.linspace(-1, 1, 5 * 64).view(5, 64)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 96), nn.Linear(96, 64, bias=False), nn.Linear(64, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


def quantised(model: nn.Module, leave: tuple[str, ...] = ()) -> nn.Module:
    """The model with NVFP4 weights of torchao."""
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig
    from torchao.quantization import quantize_

    wanted = lambda module, path: isinstance(module, nn.Linear) and path not in leave  # noqa: E731
    quantize_(model, NVFP4WeightOnlyConfig(), filter_fn=wanted)
    return model


def linear(n: int = 64, k: int = 64) -> nn.Linear:
    return quantised(nn.Sequential(nn.Linear(k, n)))[0]


@pytest.fixture
def model() -> nn.Module:
    return quantised(MLP(), leave=("head",))


def plain(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    return [tensor] if names is None else [getattr(tensor, name) for name in names]


def bits(model: nn.Module) -> list[tuple[str, list[bytes]]]:
    """The state dict in its order, as bytes."""
    parts = {
        key: [t.detach().contiguous().flatten() for t in plain(value)] for key, value in model.state_dict().items()
    }
    return [(key, [bytes(t.view(torch.uint8).tolist()) for t in value]) for key, value in parts.items()]


def storages(model: nn.Module) -> list[weakref.ref]:
    """Of the weights that prepare swaps, or of the packed ones; a factor of one element may stay."""
    return [
        weakref.ref(t.untyped_storage())
        for module in (model.up, model.down)
        for held in held_tensors(module)
        if held is not module.bias
        for t in plain(held)
        if t.numel() > 1
    ]


def alive(references: list[weakref.ref]) -> list[bool]:
    gc.collect()
    return [reference() is not None for reference in references]


# prepare


def test_each_linear_has_a_row(model):
    assert prepare(model).rows == (
        Swap("up", "torchao", "NVFP4 group 16", None, 96 * 32 + 128 * 4, 2 * (2048 + 256) + 96 * 4),
        Swap("down", "torchao", "NVFP4 group 16", None, 64 * 48 + 128 * 8, 2 * (2048 + 256) + 64 * 4),
        Swap("head", None, None, DENSE),
    )


def test_rows_are_told_apart(model):
    swaps = prepare(model)
    assert [row.path for row in swaps.done] == ["up", "down"]
    assert [row.path for row in swaps.refused] == ["head"]


def test_they_are_printed_as_a_table(model):
    assert str(prepare(model)).splitlines() == [
        "module  producer  format          bytes               outcome",
        "up      torchao   NVFP4 group 16  3.5 KiB -> 4.9 KiB  swapped",
        "down    torchao   NVFP4 group 16  4.0 KiB -> 4.8 KiB  swapped",
        f"head    -         -               -                   {DENSE}",
        "swapped 2 of 3 linears: 7.5 KiB -> 9.6 KiB",
    ]


def test_a_model_without_linears_has_no_rows():
    assert prepare(nn.Sequential(nn.ReLU())).rows == ()


def test_the_linears_are_swapped_and_the_rest_stays(model, assert_near):
    expected, head, bias = model(X), model.head, model.up.bias
    prepare(model)
    assert isinstance(model.up, PackedLinear) and isinstance(model.down, PackedLinear) and model.head is head
    assert model.up.bias is bias and model.down.bias is None
    assert_near(model(X), expected)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_flag_is_kept(model, training):
    prepare(model.train(training))
    assert model.up.training == training


def test_compiled_it_equals_the_original_in_eager_mode(model, assert_near):
    model.bfloat16()
    x = X.bfloat16()
    with torch.no_grad():
        expected = model(x)
        prepare(model)
        assert_near(torch.compile(model, backend="marlin_w4a16", fullgraph=True)(x), expected)


def test_the_model_itself_is_not_swapped():
    module = linear()
    assert refusals(prepare(module)) == {"": "it is the model itself: prepare() swaps the modules in a model"}
    assert module(X).shape == (5, 64)


def test_an_unknown_way_with_activations_raises(model):
    with pytest.raises(ValueError, match="activation_quant: found 'ignore', expected 'refuse' or 'drop'"):
        prepare(model, activation_quant="ignore")
    assert isinstance(model.up, nn.Linear)


def test_a_second_time_changes_nothing(model):
    prepare(model)
    before, modules = bits(model), [model.up, model.down]
    swaps = prepare(model)
    assert not swaps.done
    assert refusals(swaps) == dict.fromkeys(("up", "down"), "it is packed already") | {"head": DENSE}
    assert modules == [model.up, model.down] and bits(model) == before
    assert len(restore(model).done) == 2


@pytest.mark.parametrize(
    "hook",
    [
        lambda module: module.register_forward_hook(lambda *args: None),
        lambda module: module.register_forward_pre_hook(lambda *args: None),
        lambda module: module.register_full_backward_hook(lambda *args: None),
        lambda module: module.register_full_backward_pre_hook(lambda *args: None),
        lambda module: setattr(module, "_hf_hook", object()),
    ],
    ids=["forward", "forward pre", "backward", "backward pre", "accelerate"],
)
def test_a_linear_with_hooks_is_left(model, hook):
    hook(model.up)
    up, before = model.up, bits(model)
    assert refusals(prepare(model))["up"] == "it has hooks, which a PackedLinear would lose"
    assert model.up is up and bits(model)[:2] == before[:2]
    assert isinstance(model.down, PackedLinear)


def test_a_weight_on_the_meta_device_is_left(model):
    model.up.to("meta")
    assert refusals(prepare(model))["up"] == "its weight holds no values: it is on the meta device"
    assert isinstance(model.down, PackedLinear)


def test_a_linear_without_a_weight_is_no_reason_to_fail(model):
    model.head.weight = None
    assert [row.path for row in prepare(model).done] == ["up", "down"]


def test_a_linear_of_two_parents_is_swapped_in_both(assert_near):
    shared = linear()
    model = nn.Sequential(nn.Sequential(shared), nn.ReLU(), nn.Sequential(shared))
    before, expected = bits(model), model(X)
    assert [row.path for row in prepare(model).rows] == ["0.0"]
    assert isinstance(model[0][0], PackedLinear) and model[0][0] is model[2][0]
    assert_near(model(X), expected)
    restore(model)
    assert model[0][0] is shared and model[2][0] is shared
    assert bits(model) == before and torch.equal(model(X), expected)


def test_a_linear_that_stands_twice_in_one_parent_is_swapped_in_both_places(assert_near):
    shared = linear()
    model = nn.Sequential(shared, nn.ReLU(), shared)
    expected = model(X)
    prepare(model)
    assert isinstance(model[0], PackedLinear) and model[0] is model[2]
    assert_near(model(X), expected)
    restore(model)
    assert model[0] is shared and model[2] is shared
    assert torch.equal(model(X), expected)


def test_the_memory_of_the_originals_is_freed(model):
    originals = storages(model)
    assert len(originals) == 4 and all(alive(originals))
    swaps = prepare(model)
    assert swaps.done and not any(alive(originals))
    packed = storages(model)
    assert len(packed) == 6 and all(alive(packed))
    swaps = restore(model)
    assert swaps.done and not any(alive(packed))


def test_the_originals_go_one_at_a_time(model, monkeypatch):
    """The second linear is read when the first one's weight is gone."""
    originals, seen, read = storages(model), [], producer.read

    def watched(module, recover):
        if module in (model.up, model.down):
            seen.append(alive(originals))
        return read(module, recover)

    monkeypatch.setattr(producer, "read", watched)
    prepare(model)
    assert seen == [[True] * 4, [False] * 2 + [True] * 2]


@pytest.mark.parametrize("step", ["producers.torchao.read", "prepare.pack"])
def test_a_linear_that_raises_is_left_as_it_was(model, assert_near, monkeypatch, step):
    before, up, expected, calls = bits(model), model.up, model(X), []
    module, _, name = step.rpartition(".")
    module = importlib.import_module(f"marlin_w4a16.{module}")
    original = getattr(module, name)

    def fail_once(first, *others):
        if first is not model:  # which is read, too
            calls.append(first)
            if len(calls) == 1:
                raise RuntimeError("no memory")
        return original(first, *others)

    monkeypatch.setattr(module, name, fail_once)
    swaps = prepare(model)
    assert refusals(swaps)["up"] == "it raises RuntimeError: no memory" and [row.path for row in swaps.done] == ["down"]
    assert model.up is up and bits(model)[:2] == before[:2]
    assert_near(model(X), expected)


# restore


@pytest.mark.parametrize("training", [True, False])
def test_the_very_modules_come_back_bit_for_bit(model, training):
    model.train(training)
    before, modules, output = bits(model), list(model.modules()), model(X)
    swaps = prepare(model)
    again = restore(model)
    assert [(row.path, row.before, row.after) for row in again.rows] == [
        (row.path, row.after, row.before) for row in swaps.done
    ]
    assert {(row.producer, row.format) for row in again.rows} == {("torchao", "NVFP4 group 16")}
    assert all(found is expected for found, expected in zip(model.modules(), modules, strict=True))
    assert bits(model) == before
    assert {module.training for module in model.modules()} == {training}
    assert torch.equal(model(X), output)


def test_what_is_restored_can_be_prepared_again(model):
    before = bits(model)
    for _ in range(2):
        assert len(prepare(model).done) == 2
        packed = bits(model)
        restore(model)
        assert bits(model) == before
    prepare(model)
    assert bits(model) == packed


def test_modules_come_back_in_the_mode_the_model_is_in(model):
    prepare(model.train())
    model.eval()
    restore(model)
    assert not model.up.training


@pytest.mark.parametrize("assign", [False, True], ids=["in place", "assign"])
def test_weights_and_biases_that_were_loaded_meanwhile_come_back(model, assign):
    other = quantised(MLP(), leave=("head",))
    expected, output = bits(other), other(X)
    prepare(model)
    prepare(other)
    model.load_state_dict(other.state_dict(), assign=assign)
    restore(model)
    assert bits(model) == expected and torch.equal(model(X), output)


def test_a_bias_that_was_trained_meanwhile_comes_back(model):
    bias = model.up.bias
    prepare(model)
    with torch.no_grad():
        model.up.bias.add_(1)
    expected = model.up.bias.clone()
    restore(model)
    assert model.up.bias is bias and torch.equal(bias, expected)


def test_a_bias_that_was_taken_away_stays_away(model):
    prepare(model)
    model.up.bias = None
    restore(model)
    assert model.up.bias is None


def test_a_weight_that_the_producer_cannot_hold_stays_packed(model, assert_near):
    prepare(model)
    weight = quantize_nvfp4(torch.randn(96, 64))
    weight.multiplier[0] *= 2
    model.up.load_state_dict(PackedLinear(weight, torch.zeros(96)).state_dict())
    up = model.up
    swaps = restore(model)
    assert refusals(swaps) == {"up": "up: found a multiplier per row, expected one for all"}
    assert [row.path for row in swaps.done] == ["down"] and model.up is up
    assert_near(model.up(X), nn.functional.linear(X, weight.decode(torch.float32)))


def test_a_hand_made_packed_linear_stays():
    module = PackedLinear(quantize_nvfp4(torch.randn(64, 64)))
    model = nn.Sequential(module)
    assert restore(model).rows == (Swap("0", None, "NVFP4 group 16", "prepare() did not make it"),)
    assert model[0] is module


def test_a_packed_linear_by_itself_stays(model):
    prepare(model)
    (row,) = restore(model.up).rows
    assert row.path == "" and row.refusal is not None
    assert len(restore(model).done) == 2


def test_restored_linears_are_freed_one_at_a_time(monkeypatch):
    model = nn.Sequential(*(linear() for _ in range(4)))
    prepare(model)
    storages = [weakref.ref(packed.words.untyped_storage()) for packed in model]
    alive, fill = [], producer.fill

    def counted(*args):
        gc.collect()
        alive.append(sum(storage() is not None for storage in storages))
        return fill(*args)

    monkeypatch.setattr(producer, "fill", counted)
    restore(model)
    assert alive == [4, 3, 2, 1]


def test_a_model_without_packed_linears_has_no_rows(model):
    assert restore(model).rows == ()


def test_a_part_of_a_model_can_be_restored(assert_near):
    model = quantised(nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))))
    expected = model(X)
    prepare(model)
    assert [row.path for row in restore(model[0]).done] == ["0"]
    assert isinstance(model[0][0], nn.Linear) and isinstance(model[1][0], PackedLinear)
    assert_near(model(X), expected)


# Copies


def test_a_deep_copy_works_and_is_restored_by_itself(model):
    before, output = bits(model), model(X)
    prepare(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    assert len(restore(copied).done) == 2
    assert bits(copied) == before and torch.equal(copied(X), output)
    assert isinstance(model.up, PackedLinear)
    restore(model)
    assert model.up is not copied.up and bits(model) == before
    assert not {p.data_ptr() for p in plain(model.up.weight)} & {p.data_ptr() for p in plain(copied.up.weight)}
    assert model.up.bias is not copied.up.bias


def test_a_saved_model_works_and_is_not_restored(model, tmp_path):
    prepare(model)
    torch.save(model, tmp_path / "model")
    loaded = torch.load(tmp_path / "model", weights_only=False)
    assert torch.equal(loaded(X), model(X))
    reason = "the original module is not saved with a packed one"
    swaps = restore(loaded)
    assert [(row.path, row.producer, row.refusal) for row in swaps.rows] == [
        ("up", "torchao", reason),
        ("down", "torchao", reason),
    ]
    assert refusals(restore(copy.deepcopy(loaded))) == dict.fromkeys(("up", "down"), reason)
    assert torch.equal(loaded(X), model(X))
    assert len(restore(model).done) == 2
