"""Each form of the matrix in tests/programs gets from the backend what it says, and computes what it should."""

import copy
import re
from collections.abc import Container

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import explain
from marlin_w4a16.kernels.fp4 import round_once
from narrow import case
from programs.backend import through_backend
from programs.hand import FORMS, SECTIONS
from programs.program import Program

FLOAT32_ULPS = 2
TOO_SMALL = 1e-6
OF = {
    outcome: [f for f in FORMS if f.outcome == outcome]
    for outcome in ("replaced", "tolerance", "refused", "no candidate")
}
FIRST = [section.FORMS[0] for section in SECTIONS]


def each(forms: list[Program], narrow: Container[Program] | None = None) -> pytest.MarkDecorator:
    """Every form; those outside the narrow set, if there is one, are wide."""
    wide = [] if narrow is None else [form for form in forms if form not in narrow]
    return pytest.mark.parametrize("form", [case(form, narrow=form not in wide) for form in forms], ids=str)


def product_of_the_exact(module: nn.Module, inputs: tuple) -> Tensor:
    """The oracle: the form's product in float64, with the exact decode of its weight."""
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
            parameter.data = parameter.data.double()
    return module.product(module.exact(), *(x.double() if x.is_floating_point() else x for x in inputs))


def weights_of(form: Program) -> list[tuple[Tensor, Tensor]]:
    """The weights as traced, and exactly."""
    module, _ = form.build()
    found, exact = module.weight(), module.exact()
    pairs = list(zip(found, exact, strict=True)) if isinstance(found, tuple) else [(found, exact)]
    assert all(w.shape == e.shape and w.dtype == form.dtype for w, e in pairs)
    return pairs


def ulps(weight: Tensor, exact: Tensor) -> float:
    """The largest distance from a float32 weight to the exact one, in units in the last place of that."""
    near = exact.float().abs()
    unit = torch.nextafter(near, torch.full_like(near, torch.inf)) - near
    return float(((weight.double() - exact).abs() / unit).max())


def relative(weight: Tensor, exact: Tensor) -> float:
    """The largest relative difference of an element."""
    return float(((weight.double() - exact).abs() / exact.abs().clamp(min=torch.finfo(torch.float64).tiny)).max())


def test_names_are_unique():
    assert len({str(form) for form in FORMS}) == len(FORMS)


@each(OF["replaced"])
def test_the_form_is_what_it_says(form):
    """A weight is the exact decode, rounded once, but for the roundings of float32 before a cast."""
    for weight, exact in weights_of(form):
        if form.dtype == torch.float32:
            assert ulps(weight, exact) <= FLOAT32_ULPS
        else:
            assert (weight == round_once(exact, form.dtype)).float().mean() > 0.999
            assert relative(weight, exact) <= torch.finfo(form.dtype).eps * 0.501


@each(OF["tolerance"])
def test_the_form_is_rounded_more_than_once_but_within_its_tolerance(form):
    ((weight, exact),) = weights_of(form)
    assert not torch.equal(weight, round_once(exact, form.dtype))
    assert TOO_SMALL < relative(weight, exact) <= form.tolerance


@each(OF["replaced"])
def test_it_is_replaced_and_computes_the_product_of_the_exact_weight(form, assert_near):
    module, inputs = form.build()
    found, line = through_backend(module, inputs)
    assert re.match(rf"replaced {form.weights} of {form.weights} (FP4 linears|stacks of FP4 matrices)", line), line
    assert_near(found, module(*inputs))
    assert_near(found, product_of_the_exact(module, inputs).to(found.dtype))


@each(FIRST)
def test_it_runs_through_inductor(form, assert_near):
    module, inputs = form.build()
    found, _ = through_backend(module, inputs, inductor=True)
    assert_near(found, module(*inputs))


@each(OF["replaced"], [form for form in OF["replaced"] if form in FIRST or form.weights > 1])
def test_explain_says_so(form):
    module, inputs = form.build()
    report = explain(module, *inputs)
    assert report.graphs == 1
    assert (len(report.replaced), len(report.rejected)) == (form.weights, 0), str(report)


@each(OF["tolerance"], OF["tolerance"][::4])
def test_what_is_rounded_more_than_once_is_left_with_too_small_a_tolerance(form):
    module, inputs = form.build()
    found, line = through_backend(module, inputs, tolerance=TOO_SMALL)
    assert "replaced 0 of 1" in line and form.reason in line and "tolerance" in line
    assert torch.equal(found, module(*inputs))


@each(OF["tolerance"])
def test_what_is_rounded_more_than_once_is_replaced_within_a_tolerance_alone(form, assert_near):
    module, inputs = form.build()
    expected = module(*inputs)
    found, line = through_backend(module, inputs)
    assert "replaced 0 of 1" in line and form.reason in line and "tolerance" in line
    assert torch.equal(found, expected)
    found, line = through_backend(module, inputs, tolerance=form.tolerance)
    assert line.startswith("replaced 1 of 1 FP4 linears"), line
    assert_near(found, expected)
    assert_near(found, product_of_the_exact(module, inputs).to(found.dtype))


@each(OF["refused"])
def test_it_is_refused_with_a_reason_and_runs_as_written(form):
    module, inputs = form.build()
    found, line = through_backend(module, inputs)
    assert f"replaced 0 of {form.weights} FP4 linears" in line and (form.reason or "") in line
    torch.testing.assert_close(found, module(*inputs), rtol=0, atol=0, equal_nan=True)


@each(OF["no candidate"])
def test_it_is_no_candidate_and_runs_as_written(form):
    module, inputs = form.build()
    found, line = through_backend(module, inputs)
    assert "no product of this graph has a weight made from FP4 codes" in line
    assert torch.equal(found, module(*inputs))
