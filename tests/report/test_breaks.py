"""Each model here breaks as its name says; expected are the cause and the lines that have the comment ``# here``."""

import inspect
import os
import re

import pytest
import torch
from torch import Tensor, nn

from marlin_w4a16 import explain
from marlin_w4a16.report.breaks import Break, BreakWatch, breaks_of

X = torch.linspace(-1, 1, 3 * 8).view(3, 8)
lin = nn.Linear(8, 8)
CALL = "Call to `torch._dynamo.graph_break()`: User-inserted graph break. Message: None"
PRINT = "Failed to trace builtin operator: Dynamo does not know how to trace builtin operator `print`"
JUMP = "Data-dependent branching: Detected data-dependent branching"


def before_any_operator(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()  # here
    return lin(x)


def before_the_return(x: Tensor) -> Tensor:
    x = lin(x)
    torch._dynamo.graph_break()  # here
    return x


def several(x: Tensor) -> Tensor:
    x = lin(x)
    torch._dynamo.graph_break()  # here
    x = lin(x)
    torch._dynamo.graph_break()  # here
    return lin(x)


def inner(x: Tensor) -> Tensor:
    x = lin(x)
    print("in the model")  # here
    return lin(x)


def nested(x: Tensor) -> Tensor:
    return lin(inner(lin(x)))


def branch(x: Tensor) -> Tensor:
    x = lin(x)
    if x.sum() < 1e9:  # here
        return lin(x)
    return x


def in_try(x: Tensor) -> Tensor:
    x = lin(lin(x)).relu()
    try:  # here
        print("in the model")  # here
    finally:
        x = x + 1
    return lin(x)


def in_loop(x: Tensor) -> Tensor:
    for _ in range(3):
        x = lin(x)
        torch._dynamo.graph_break()  # here
    return lin(x)


def with_file(x: Tensor) -> Tensor:
    x = lin(x)
    with open(os.devnull):
        x = lin(x)
    return lin(x)


def unbroken(x: Tensor) -> Tensor:
    return lin(lin(x)).relu()


def places(*functions) -> list[str]:
    found = []
    for function in functions:
        lines, first = inspect.getsourcelines(function)
        for number, line in enumerate(lines, first):
            if line.endswith("# here\n"):
                found.append(f"{__file__}:{number} in {function.__name__}: {line.strip().removesuffix('  # here')}")
    return found


@pytest.mark.parametrize(
    "model, cause, functions, graphs",
    [
        (before_any_operator, CALL, [before_any_operator], 1), (before_the_return, CALL, [before_the_return], 1),
        (several, CALL, [several], 3), (nested, PRINT, [inner], 4), (branch, JUMP, [branch], 2),
        (in_try, PRINT, [in_try], 1), (unbroken, "", [], 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_each_break_is_listed_once_with_its_cause_and_place(model, cause, functions, graphs):
    report = explain(model, X)
    assert sorted(one.where.removesuffix("  # here") for one in report.breaks) == places(*functions)
    assert all(one.reason.startswith(cause) for one in report.breaks) and report.graphs == graphs


def test_another_explain_finds_the_same_breaks():
    assert explain(several, X).breaks == explain(several, X).breaks and not explain(unbroken, X).breaks


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x)
        torch._dynamo.graph_break()
        return self.lin(x)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_break_in_a_module_called_in_a_loop_also_skips_the_loop():
    inside, skipped = explain(Layers(), X).breaks
    assert inside.reason == CALL and " in forward: torch._dynamo.graph_break()" in inside.where
    first = inspect.getsourcelines(Layers.forward)[1]
    assert skipped.reason == f"{CALL}; so Dynamo skips forward ({__file__}:{first})"
    assert skipped.where == inside.where.replace(" in forward", "")


def test_a_model_of_which_nothing_is_traced_is_an_error_with_the_cause():
    with pytest.raises(RuntimeError, match="Dynamo traced no graph of this call") as caught:
        explain(in_loop, X)
    first = inspect.getsourcelines(in_loop)[1]
    (where,) = places(in_loop)
    assert f"{CALL}; so Dynamo skips in_loop ({__file__}:{first})" in str(caught.value)
    assert where.replace(" in in_loop", "") in str(caught.value)


def test_the_rest_of_a_function_may_be_skipped():
    opened, skipped = explain(with_file, X).breaks
    assert opened.reason.startswith("Failed to trace builtin operator: ") and "builtin operator `open`" in opened.reason
    assert re.fullmatch(
        r"Unsupported context manager: .*[^.]; so Dynamo skips the rest of with_file \(.*\)", skipped.reason
    )


def test_causes_that_dynamo_hides_are_told_apart_by_looking_at_every_graph():
    assert {one.reason[:30] for one in explain(lambda x: in_try(branch(x)), X).breaks} == {PRINT[:30], JUMP[:30]}


def test_a_function_without_operators_is_no_break():
    watch = BreakWatch()
    torch.compile(lambda x: x, backend="eager")(X)
    assert not watch.look()


def test_an_error_of_the_backend_is_no_break():
    def backend(gm, _):
        raise ValueError("mine")

    watch = BreakWatch()
    with pytest.raises(Exception, match="mine"):
        torch.compile(unbroken, backend=backend)(X)
    assert not watch.look()


def test_a_hidden_cause_is_named_only_if_it_is_certain():
    """Dynamo counts refusals but does not say which one belongs to a break that it calls step_unsupported."""
    counts = torch._dynamo.utils.counters["unimplemented"]
    watch = BreakWatch()
    torch.compile(in_try, backend="eager")(X)
    counts["another"] += 1
    (found,) = watch.look()
    assert found.reason.startswith("a break that Dynamo cannot resume from")


def test_a_watch_sees_only_what_came_after_it():
    torch.compile(several, backend="eager")(X)
    watch = BreakWatch()
    assert not watch.look()
    torch.compile(before_any_operator, backend="eager")(X)
    assert len(watch.look()) == 1
    torch.compile(nested, backend="eager")(X)
    assert [one.reason[:6] for one in watch.look()] == ["Call t", "Failed"]


def test_a_recompile_limit_is_listed_without_a_place():
    watch = BreakWatch()
    compiled = torch.compile(lambda x, n: lin(x) * n, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in range(3):
            compiled(X, n)
    (found,) = watch.look()
    assert found.reason.startswith("Dynamo recompile limit exceeded: ") and found.where is None
    assert str(found) == found.reason


def test_one_graph_knows_the_break_behind_it():
    found = []
    torch.compile(several, backend=lambda gm, _: found.append(breaks_of(gm)) or gm.forward)(X)
    assert [[one.where.removesuffix("  # here") for one in breaks] for breaks in found] == [
        [place] for place in places(several)
    ] + [[]]


def test_a_graph_that_dynamo_did_not_make_has_no_break():
    assert breaks_of(torch.fx.symbolic_trace(lin)) == ()


def test_a_break_is_printed_with_its_place():
    assert str(Break("because", "model.py:3")) == "because\n  at model.py:3"
