"""Models as their producers' own code runs them."""

import copy
import re
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import refresh
from programs.producers import FORMS, RIGHT, K, N, Torchao, modelopt, modelopt_w4a4, mxfp4, nvfp4

MARKS = {
    "ModelOpt": pytest.mark.skipif(torch.__version__ < "2.13",
     reason="the Dynamo of torch 2.11 and 2.12 cannot trace ModelOpt's modules, for any backend"),
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:Real quantization has been applied:UserWarning"),
    pytest.mark.filterwarnings("ignore:RealQuantLinear:UserWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the 'model_fields' attribute"),
    pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning"),
]
EAGERLY = pytest.mark.parametrize("compiler", ["eager"], indirect=True)
X = torch.linspace(-1, 1, 3 * K).view(3, K).bfloat16()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["eager", "inductor"])
def compiler(request, monkeypatch) -> str:
    """What runs the graph that the pass made."""
    if request.param == "eager":
        monkeypatch.setattr("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward)
    return request.param


def compiled(function, **options):
    return torch.compile(function, backend="marlin_w4a16", fullgraph=True, options=options or None)


def each(forms, wide=()):
    def marks(form) -> list[pytest.MarkDecorator]:
        return [mark for mark in (MARKS.get(form.section), pytest.mark.wide if form in wide else None) if mark]

    return pytest.mark.parametrize("form", [pytest.param(f, marks=marks(f), id=str(f)) for f in forms])


def test_names_are_unique():
    assert len({str(form) for form in FORMS}) == len(FORMS)


@each(FORMS, wide=[form for at, form in enumerate(FORMS) if at % 4 in (1, 2)])  # one dtype of each, in turn
@EAGERLY
def test_a_producers_form_has_its_outcome(form, compiler, said, assert_near):
    model, inputs = form.build()
    assert_near(compiled(model)(*inputs), model(*inputs))
    ((level, line),) = said()
    if form.outcome == "replaced":
        assert re.match(rf"replaced {form.weights} of {form.weights} (FP4 linears|stacks of FP4 matrices) ", line), line
        assert level == "INFO"
    else:
        assert f"replaced 0 of {form.weights} FP4 linears" in line and form.reason in line, line


@each({form.section: form for form in reversed(FORMS)}.values())
@pytest.mark.parametrize("compiler", ["inductor"], indirect=True)
def test_it_runs_through_inductor(form, compiler, assert_near):
    model, inputs = form.build()
    assert_near(compiled(model)(*inputs), model(*inputs))


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in RIGHT.items()])
@EAGERLY
def test_what_may_be_left_is_right(build, compiler, assert_near):
    model, inputs = build()
    assert_near(compiled(model)(*inputs), model(*inputs))


@pytest.fixture
def quantised_inputs() -> Torchao:
    """torchao itself runs this on an SM100 only; nothing in the graph tells it from W4A16."""
    from torchao.prototype.mx_formats.nvfp4_tensor import QuantizeTensorToNVFP4Kwargs

    inputs = QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True, is_swizzled_scales=True)
    return layer(is_swizzled_scales=True, act_quant_kwargs=inputs)


@EAGERLY
def test_an_nvfp4_weight_whose_inputs_are_quantised_is_refused(quantised_inputs, compiler, said):
    with pytest.raises(Exception, match=r"Invalid scaling configuration|per-tensor scaling"):
        compiled(quantised_inputs)(X)
    ((_, line),) = said()
    assert "replaced 0 of 1 FP4 linears" in line and "quantises the input" in line, line


@EAGERLY
def test_the_quantisation_of_inputs_is_dropped(quantised_inputs, compiler, assert_near):
    run = compiled(quantised_inputs, activation_quant="drop")
    assert_near(run(X), linear(X, quantised_inputs.weight.dequantize(), quantised_inputs.bias))
    quantised_inputs.weight.qdata.copy_(quantised_inputs.weight.qdata.roll(1, 0))
    assert_near(run(X), linear(X, quantised_inputs.weight.dequantize(), quantised_inputs.bias))


@EAGERLY
@pytest.mark.parametrize("choice, replaced", [("drop", 2), ("refuse", 0)])
@pytest.mark.parametrize("config", ["NVFP4_DEFAULT_CFG", "MXFP4_DEFAULT_CFG"])
@MARKS["ModelOpt"]
def test_the_quantisation_of_inputs_by_modelopt(config, choice, replaced, compiler, said, assert_near):
    model, (x,) = modelopt_w4a4(config, torch.bfloat16)
    as_traced = model(x)
    found = compiled(model, activation_quant=choice)(x)
    ((_, line),) = said()
    assert f"replaced {replaced} of 2 FP4 linears" in line, line
    if choice == "refuse":
        assert torch.equal(found, as_traced)
        return
    for part in (model.up, model.down):
        part.input_quantizer.disable()
    assert_near(found, model(x))
    assert (found - as_traced).norm() > 0.02 * as_traced.norm()


def layer(quantise: Callable[..., Tensor] = nvfp4, n: int = N, **choices) -> Torchao:
    def multiply(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight if quantise is nvfp4 else weight.dequantize(), bias)

    return Torchao(quantise(torch.randn(n, K).bfloat16(), **choices), multiply, torch.bfloat16)


def copy_(module, other):
    module.weight.copy_(other.weight)


def in_inference_mode(module, other):
    with torch.inference_mode():
        module.weight.copy_(other.weight)


def exchanged_parameters(module, other):
    module.weight, other.weight = other.weight, module.weight


def scales_inside(module, other):
    module.weight.scale.view(torch.uint8).copy_(other.weight.scale.view(torch.uint8))


CHANGES = {
    "load_state_dict": lambda module, other: module.load_state_dict(other.state_dict()),
    "assign_state_dict": lambda module, other: module.load_state_dict(other.state_dict(), assign=True),
    "copy_": copy_,
    "in_inference_mode": in_inference_mode,
    "new_parameter": lambda module, other: setattr(
        module, "weight", nn.Parameter(other.weight.detach().clone(), requires_grad=False)
    ),
    "exchanged_parameters": exchanged_parameters,
    # as ``module.to`` does it: the outer tensor stays what it was
    "swapped_tensors": lambda module, other: torch.utils.swap_tensors(module.weight, other.weight),
    "codes_inside": lambda module, other: module.weight.qdata.copy_(other.weight.qdata),
    "scales_inside": scales_inside,
    "other_codes_inside": lambda module, other: setattr(module.weight, "qdata", other.weight.qdata),
    "data_of_the_codes_inside": lambda module, other: setattr(module.weight.qdata, "data", other.weight.qdata.clone()),
    "tensor_scale_inside": lambda module, other: module.weight.per_tensor_scale.mul_(3),
}
WEIGHTS = {
    "NVFP4": {}, "NVFP4, swizzled": {"is_swizzled_scales": True}, "NVFP4, no tensor scale": {"tensor_scale": False},
    "MXFP4": {"quantise": mxfp4}, "MXFP4, swizzled": {"quantise": mxfp4, "is_swizzled_scales": True},
}  # fmt: skip
CASES = [
    pytest.param(change, choices, id=f"{change}-{name}")
    for change in CHANGES
    for name, choices in WEIGHTS.items()
    if change != "tensor_scale_inside" or choices in ({}, WEIGHTS["NVFP4, swizzled"])
]


@pytest.mark.parametrize("change, choices", CASES)
@EAGERLY
def test_a_changed_weight_of_torchao(change, choices, compiler, assert_near, levels):
    module = layer(**choices)
    run = compiled(module)
    before = run(X)
    assert_near(before, module(X))
    CHANGES[change](module, layer(**choices))
    for _ in range(2):
        after = run(X)
        assert_near(after, module(X))
    assert (after - before).norm() > 0.01 * before.norm() and levels() == ["INFO"]


@pytest.mark.parametrize("choices", WEIGHTS.values(), ids=WEIGHTS)
@EAGERLY
def test_a_write_to_a_weight_of_torchao_that_nothing_sees(choices, compiler, assert_near):
    module = layer(**choices)
    run = compiled(module)
    before = run(X)
    module.weight.data.copy_(layer(**choices).weight)
    refresh(module)
    assert_near(run(X), module(X))
    assert (run(X) - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("choices", WEIGHTS.values(), ids=WEIGHTS)
def test_instances_through_one_compiled_function(choices, compiler, assert_near, levels):
    run = compiled(lambda module, x: module(x))
    a, b = layer(**choices), layer(**choices)
    twin = copy.deepcopy(a)
    for module in (a, b, twin, a, b):
        assert_near(run(module, X), module(X))
    copy_(a, b)
    for module, like in ((a, b), (twin, twin), (b, b)):
        assert_near(run(module, X), like.multiply(X, like.weight, module.bias))
    assert levels() == ["INFO"]


@EAGERLY
def test_instances_of_other_metadata_are_compiled_again(compiler, assert_near, levels):
    run = compiled(lambda module, x: module(x))
    modules = [layer(**choices) for choices in WEIGHTS.values() if "quantise" not in choices]
    for module in modules * 2:
        module.multiply = linear
        assert_near(run(module, X), module(X))
    assert levels() == ["INFO"] * len(modules)


def test_a_weight_of_torchao_that_is_cast_in_place(compiler, assert_near):
    """``module.to`` swaps what is inside, and the outer tensor keeps its identity; torch can only do so while nothing
    holds a weak reference to it."""
    module = layer()
    run = compiled(module)
    assert_near(run(X), module(X))
    module.to(torch.float32)
    assert_near(run(X.float()), module(X.float()))


@EAGERLY
def test_layers_of_torchao_compiled_one_by_one(compiler, assert_near, levels):
    model = nn.Sequential(*(layer(n=K) for _ in range(3)))
    for part in model:
        part.multiply = linear
    expected = model(X)
    for part in model:
        part.compile(backend="marlin_w4a16", fullgraph=True)
    for _ in range(2):
        assert_near(model(X), expected)
    assert levels() == ["INFO"]


@EAGERLY
def test_weights_of_torchao_made_in_inference_mode(compiler, assert_near):
    with torch.inference_mode():
        a, b = layer(), layer()
        run = compiled(lambda module, x: module(x))
        for module in (a, b, a):
            assert_near(run(module, X), module(X))


@EAGERLY
def test_a_weight_of_torchao_is_not_kept_alive(compiler, assert_near):
    module = layer()
    run = compiled(lambda module, x: module(x))
    run(module, X)
    gone = weakref.ref(module.weight.qdata)
    module.weight = layer().weight
    assert_near(run(module, X), module(X))
    assert gone() is None


@MARKS["ModelOpt"]
def test_the_first_graph_of_modelopt_gives_its_table_out(assert_near, levels):
    """The graph of the first call in a process puts the table of values into a dictionary, so it is an output too."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    model, (x,) = modelopt("W4A16_NVFP4_CFG", None, False, torch.bfloat16)
    NVFP4QTensor.e2m1_values_on_device.clear()
    run = compiled(model)
    for _ in range(2):
        found = run(x)
        (table,) = NVFP4QTensor.e2m1_values_on_device.values()
        assert table.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
        assert_near(found, model(x))
    assert set(levels()) == {"INFO"}


@MARKS["ModelOpt"]
@pytest.mark.parametrize("config", ["W4A16_NVFP4_CFG", "MXFP4_DEFAULT_CFG"])
@EAGERLY
def test_a_changed_weight_of_modelopt(config, compiler, assert_near, levels):
    (model, (x,)), (other, _) = (modelopt(config, None, False, torch.bfloat16) for _ in range(2))
    run = compiled(model)
    before = run(x)
    model.load_state_dict(other.state_dict())
    after = run(x)
    assert_near(after, other(x))
    assert (after - before).norm() > 0.01 * before.norm() and levels() == ["INFO"]
