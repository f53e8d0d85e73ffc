"""Runs what was generated, in eager and compiled, and says what became of it.

Nothing is compiled by Inductor: what the pass made of a graph runs eagerly. Several programs share one graph, so that
Dynamo's cost is shared, and what the pass keeps for a graph has to serve them all.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from attacks.case import Case, seeded
from attacks.compare import Call, compare
from attacks.settings import SETTINGS
from marlin_w4a16.passes.outcome import Replaced
from marlin_w4a16.report.data import Report

OUTCOMES = ("accepted", "in pieces", "refused", "not traced", "not run", "wrong")
_DRAWS = (16, 256)  # of inputs that are a rounding away: more of them before anything is called wrong
_ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a case.

    Attributes:
        outcome: ``"accepted"``; ``"in pieces"``: the products of a mixture, not the whole; ``"refused"``, also of what
            is no candidate; ``"not traced"`` by Dynamo; ``"not run"`` by eager; ``"wrong"``.
        detail: of what is wrong or not traced.
    """

    seed: int
    kind: str
    form: str
    mutation: str
    outcome: str
    detail: str = ""

    @property
    def family(self) -> str:
        """The form without what was drawn for it."""
        return self.form.partition(" ")[0] if self.form.startswith("composed") else self.form.partition(" /")[0]


class Bundle(nn.Module):
    """Programs side by side in one graph."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(copy.deepcopy(case.module) for case in cases)
        self.counts = [len(case.calls[0]) for case in cases]

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        outputs, start = [], 0
        for module, count in zip(self.cases, self.counts, strict=True):
            outputs.append(module(*args[start : start + count]))
            start += count
        return tuple(outputs)


def judge(cases: Sequence[Case]) -> list[Result]:
    """What became of each, in one graph; all have one setting and as many calls."""
    runs = [eager(case) for case in cases]
    good = [case for case, run in zip(cases, runs, strict=True) if run is not None]
    judged = {result.seed: result for result in _judge(good)}
    return [judged.get(case.seed) or _result(case, "not run") for case in cases]


def _judge(cases: Sequence[Case]) -> list[Result]:
    """Those that eager runs; wrong ones again alone, and without them the others, whose random numbers they move."""
    if not cases:
        return []
    try:
        results = _together(cases)
    except Exception as error:
        if len(cases) == 1:
            return [_failed(cases[0], error)]
        half = len(cases) // 2
        return _judge(cases[:half]) + _judge(cases[half:])
    wrong = {result.seed for result in results if result.outcome == "wrong"}
    if not wrong or len(cases) == 1:
        return results
    alone = {case.seed: _judge([case])[0] for case in cases if case.seed in wrong}
    sure = {seed for seed, result in alone.items() if result.outcome == "wrong"}
    if not sure and any(case.draws for case in cases):
        return [alone.get(result.seed, result) for result in results]
    if not sure:
        beside = "right alone, wrong beside others: "
        return [replace(r, detail=beside + r.detail) if r.seed in wrong else r for r in results]
    others = {result.seed: result for result in _judge([case for case in cases if case.seed not in sure])}
    return [alone[case.seed] if case.seed in sure else others[case.seed] for case in cases]


def _together(cases: Sequence[Case]) -> list[Result]:
    torch._dynamo.reset()
    bundle, reports = Bundle(cases), []
    with backend(reports):
        dynamic = SETTINGS[cases[0].setting].dynamic
        function = torch.compile(bundle, backend="marlin_w4a16", fullgraph=True, dynamic=dynamic)
        found = run(function, bundle, cases)
    failed = [row.outcome for report in reports for row in report.rows if row.path == "(the graph)"]
    assert not failed, failed[0]  # a pass that fails leaves the graph, and proves nothing
    unchanged = Bundle(cases)
    expected, results = run(unchanged, unchanged, cases), []
    for at, (case, some, others) in enumerate(zip(cases, found, expected, strict=True)):
        limit = 2e-2 if case.rounds or case.setting == "autocast" else 0.0
        difference = compare(some, others, limit=limit)
        for draws in _DRAWS if len(cases) == 1 or not case.draws else ():
            if difference is not None:
                difference = compare(some, others, [_beside(case, limit, draw) for draw in range(draws)], limit)
        results.append(_result(case, "wrong", str(difference)) if difference else _result(case, _outcome(at, reports)))
    return results


@contextlib.contextmanager
def backend(reports: list[Report]) -> Iterator[None]:
    """The backend without Inductor; guards are not timed, which takes longer than all else."""
    with (
        patch("marlin_w4a16.backend.compile_graph", lambda gm, *_: gm.forward),
        patch("marlin_w4a16.backend.publish", lambda report, *_: reports.append(report)),
        patch("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0),
    ):
        yield


def run(
    function: Callable[..., Any], bundle: Bundle, cases: Sequence[Case], moved: Callable[[Tensor], Tensor] = lambda t: t
) -> list[list[Call]]:
    """What came out of each program, call by call; ``moved``: what becomes of the gradients of its results."""
    setting, came = SETTINGS[cases[0].setting], [[] for _ in cases]
    for number in range(len(cases[0].calls)):
        if number == 1:
            for case, module in zip(cases, bundle.cases, strict=True):
                _change(case, module)
        args = [[_given(x, setting.gradients) for x in case.calls[number]] for case in cases]
        seeded(len(cases[0].calls) * cases[0].seed + number)
        with setting.context():
            outputs = function(*(x for group in args for x in group))
        for calls, module, output, group in zip(came, bundle.cases, outputs, args, strict=True):
            values = (output, *_gradients(output, group, moved), *group, *module.buffers())
            calls.append([t.detach().clone() for t in values])
    return came


def _change(case: Case, module: nn.Module) -> None:
    if case.then is not None:
        seeded(case.seed)
        with torch.no_grad():
            case.then(module)


def _given(x: Tensor, gradients: bool) -> Tensor:
    x = x.clone()
    return x.requires_grad_() if gradients and x.is_floating_point() else x


def _gradients(output: Tensor, inputs: Sequence[Tensor], moved: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Of the inputs that want some, zeros where there are none; no more exact than the result."""
    wanted = [x for x in inputs if x.requires_grad]
    if not (wanted and output.requires_grad):
        return [torch.zeros_like(x) for x in wanted]
    given = moved(torch.linspace(-1, 2, output.numel()).view(output.shape).to(output.dtype))
    found = torch.autograd.grad(output, wanted, given, retain_graph=True, materialize_grads=True)
    return [gradient.to(output.dtype) if gradient.itemsize > output.itemsize else gradient for gradient in found]


def eager(case: Case, moved: Callable[[Tensor], Tensor] = lambda t: t) -> list[Call] | None:
    """What comes of it uncompiled, call by call; None if it raises. See `run`."""
    bundle = Bundle([case])
    try:
        return run(bundle, bundle, [case], moved)[0]
    except Exception:
        return None


def _beside(case: Case, limit: float, draw: int) -> list[Call]:
    """What eager gives for inputs, biases and gradients that are a rounding away."""

    def moved(x: Tensor) -> Tensor:
        if x.dtype not in _ROUNDING:
            return x
        rounding = max(_ROUNDING[x.dtype], 2.0**-7 if limit else 0.0)
        return (x.double() * (1 + rounding * torch.randn(x.shape))).to(x.dtype)

    seeded(draw)
    calls = tuple(tuple(moved(x) for x in call) for call in case.calls)
    module = copy.deepcopy(case.module)
    for name, t in (*module.named_buffers(), *module.named_parameters()):
        if "bias" in name:
            t.data.copy_(moved(t))
    return eager(replace(case, module=module, calls=calls), moved) or []


def _outcome(at: int, reports: list[Report]) -> str:
    rows = [row for report in reports for row in report.rows if re.search(rf"\bcases\.{at}\b", row.path)]
    replaced = [row for row in rows if isinstance(row.outcome, Replaced)]
    if not replaced:
        return "refused"
    return "in pieces" if any(row.outcome.op.endswith("grouped_linear") for row in replaced) else "accepted"


def _failed(case: Case, error: Exception) -> Result:
    """Dynamo may fail by itself; the backend may not, nor what it made."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("backend=")]
    said = f"{type(error).__name__}: {lines[0][:160] if lines else ''}"
    if isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed):
        return _result(case, "not traced", said)
    torch._dynamo.reset()
    bundle = Bundle([case])
    try:
        run(torch.compile(bundle, backend="eager", fullgraph=True), bundle, [case])
    except Exception:
        return _result(case, "not traced", said)
    return _result(case, "wrong", said)


def _result(case: Case, outcome: str, detail: str = "") -> Result:
    return Result(case.seed, case.kind, case.form, case.mutation, outcome, detail)
